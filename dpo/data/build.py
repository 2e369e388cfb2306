"""From the sources that a configuration names to token ids: read, weighted, filtered, truncated, tokenized.

Rank 0 tokenizes, once for all ranks and for every later run with the same content and options. What is
written is named by a digest of everything that decides it, so a folder is never stale.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo import distributed, terminal
from dpo.config import DataConfig, DataSource
from dpo.data.dataset import (
    FORMAT_VERSION,
    SourceGroups,
    TokenizedDataset,
    is_written,
    map_dataset,
    write_dataset,
)
from dpo.data.notes import RowNotes
from dpo.data.records import Pair, PreferenceGroup, TokenizedGroup
from dpo.data.rows import read_groups
from dpo.data.sources import PreferenceSource, has_split, open_source
from dpo.data.tokenize import TokenizeOptions, tokenize_groups, tokenizer_digest
from dpo.errors import UserError

DEFAULT_MAX_LENGTH = 1024
READER_VERSION = 2
"""Part of the digest of tokenized data: what an earlier version read or encoded otherwise is made again."""
WEIGHT_SEED = 0  # weight 0.5 takes the same half of a source in every run

Weighted = tuple[PreferenceSource, float]
"""A source and its weight."""


def open_datasets(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Training and held-out preferences in token ids; rank 0 tokenizes what is not there yet.

    Args:
        data: Where the data is and how it becomes token ids.
        tokenizer: The policy's tokenizer.
        positions: The model's longest sequence in tokens, or None without a limit.

    Raises:
        UserError: Missing or malformed data, nothing left after filtering, or lengths beyond the model's.
    """
    max_length = resolve_max_length(data.max_length, positions)
    if data.max_prompt_length is not None and data.max_prompt_length >= max_length:
        raise UserError(
            f"data.max_prompt_length: {data.max_prompt_length}; expected less than {max_length}, the longest "
            "prompt + completion: lower it, or set data.max_length"
        )
    train_sources, test_sources = train_sources_of(data), test_sources_of(data)
    same = {source.fingerprint for source, _ in train_sources}
    for source, _ in test_sources:
        if source.fingerprint in same:
            terminal.warning(
                f"data.test: {source.path} has the content of data.train; held-out metrics say nothing then"
            )
    train = _open(train_sources, data, max_length, tokenizer, "train")
    test = _open(test_sources, data, max_length, tokenizer, "test") if test_sources else None
    return train, test


def resolve_max_length(max_length: int | None, positions: int | None) -> int:
    """`data.max_length` or its default, in tokens; UserError if it exceeds the model's positions."""
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    if positions is not None and max_length > positions:
        raise UserError(f"data.max_length: {max_length}; the model has {positions} positions: lower it")
    return max_length


def check_sources(data: DataConfig) -> None:
    """Opens every source and reads its first group, without a tokenizer. Raises UserError."""
    for source, _ in [*train_sources_of(data), *test_sources_of(data)]:
        notes = RowNotes()
        if next(_read(source, data, notes), None) is None:
            lines = [f"{source.path}: nothing left after filtering: {_listed(notes.drops)}"]
            raise UserError("\n".join([*lines, *notes.drop_lines(source.path)]))


def train_sources_of(data: DataConfig) -> list[Weighted]:
    """The training sources, with their weights."""
    return _sources(data.train, "train", "data.train")


def test_sources_of(data: DataConfig) -> list[Weighted]:
    """The held-out sources: data.test, or the test splits beside the sources of data.train."""
    if data.test is not None:
        return _sources(data.test, "test", "data.test")
    paths = [data.train] if isinstance(data.train, str) else [source.path for source in data.train]
    return [(open_source(path, "test", key="data.train"), 1.0) for path in paths if has_split(path, "test")]


def _sources(named: str | list[DataSource], split: Literal["train", "test"], key: str) -> list[Weighted]:
    listed = [DataSource(path=named)] if isinstance(named, str) else named
    return [(open_source(source.path, split, key=key), source.weight) for source in listed]


def _open(
    sources: list[Weighted],
    data: DataConfig,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
) -> TokenizedDataset:
    digest = _digest(sources, data, max_length, tokenizer)
    folder = Path(data.cache_dir) / digest[:16]

    def tokenize_once() -> None:
        if not is_written(folder):
            counts: Counter[str] = Counter()
            of_sources: list[SourceGroups] = []
            groups = _tokenized(sources, data, max_length, tokenizer, counts, of_sources, split)
            write_dataset(groups, folder, counts, of_sources)
        elif data.strict:
            # The digest says that the folder holds what would be written again, and another job may have
            # it mapped: so the rows are checked, and the folder stays.
            _check_all_rows(sources, data)

    distributed.on_main(tokenize_once)
    dataset = map_dataset(folder, digest)
    notes = [line for source in dataset.sources for line in source.notes]
    if len(dataset) == 0:
        names = ", ".join(source.path for source, _ in sources)
        what = f"data.{split}: {names}: nothing left after filtering: {_listed(dataset.counts)}"
        raise UserError("\n".join([what, *notes]))
    terminal.note(*notes)
    terminal.warning(*(line for source in dataset.sources for line in source.warnings))
    return dataset


def _digest(
    sources: list[Weighted], data: DataConfig, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> str:
    """SHA-256 (hex) of everything that decides the tokenized data."""
    decisive = {
        "format": FORMAT_VERSION,
        "reader": READER_VERSION,
        "sources": [(source.fingerprint, weight) for source, weight in sources],
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": max_length,
        "options": {
            key: value
            for key, value in asdict(data).items()
            if key not in ("train", "test", "strict", "cache_dir")
        },
    } | (
        {} if data.group_pairs else {"margins": True}
    )  # an earlier version dropped them, under the same digest
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _tokenized(
    sources: list[Weighted],
    data: DataConfig,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[str],
    of_sources: list[SourceGroups],
    split: str,
) -> Iterator[TokenizedGroup]:
    """Streams the groups of all sources; `counts` and `of_sources` are complete when the stream has ended."""
    for source, weight in sources:
        num_groups = 0
        notes = RowNotes()
        groups = terminal.progress(
            read_weighted(source, weight, data, notes),
            description=f"tokenize {split}",
            unit="groups",
            leave=False,
        )
        for group in tokenize_source(groups, source, data, max_length, tokenizer, counts, notes):
            num_groups += 1
            yield group
        of_sources.append(
            SourceGroups(source.path, num_groups, notes.lines(source.path), notes.warnings(source.path))
        )
        counts.update({f"dropped/{reason}": number for reason, number in notes.drops.items()})


def _check_all_rows(sources: list[Weighted], data: DataConfig) -> None:
    for source, _ in sources:
        for _ in _read(source, data, RowNotes()):
            pass


def tokenize_source(
    groups: Iterable[PreferenceGroup],
    source: PreferenceSource,
    data: DataConfig,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[str],
    notes: RowNotes,
) -> Iterator[TokenizedGroup]:
    """Streams the groups of one source in token ids.

    Args:
        groups: Text groups of the source.
        source: Its manifest says whether completions end with EOS, unless `data.append_eos` does.
        data: The options.
        max_length: Longest prompt + completion, in tokens.
        tokenizer: The policy's tokenizer.
        counts: Receives dropped pairs and what is truncated, by reason.
        notes: Receives dropped groups.
    """
    complete = source.completions_are_complete
    options = TokenizeOptions(
        max_length=max_length,
        max_prompt_length=data.max_prompt_length,
        drop_too_long=data.too_long == "drop",
        append_eos=data.append_eos if data.append_eos is not None else complete is not False,
    )
    for group in tokenize_groups(groups, tokenizer, options, counts, notes):
        yield from [group] if data.group_pairs else split_pairs(group)


def split_pairs(group: TokenizedGroup) -> Iterator[TokenizedGroup]:
    """Every pair of a group as a group of its own, with its margin."""
    margins = group.margins or [None] * len(group.pairs)
    for (chosen, rejected), margin in zip(group.pairs, margins, strict=True):
        yield TokenizedGroup(
            prompt=group.prompt,
            completions=(group.completions[chosen], group.completions[rejected]),
            pairs=(Pair(0, 1),),
            margins=None if margin is None else (margin,),
        )


def read_weighted(
    source: PreferenceSource, weight: float, data: DataConfig, notes: RowNotes
) -> Iterator[PreferenceGroup]:
    """Streams the source's groups: each floor(weight) times, and once more with the probability that is left.

    Args:
        source: From `open_source`.
        weight: Above 0.
        data: How rows become groups.
        notes: Counts dropped rows and unused columns.
    """
    generator = np.random.default_rng(WEIGHT_SEED)
    for group in _read(source, data, notes):
        for _ in range(int(weight + generator.random())):
            yield group


def _read(source: PreferenceSource, data: DataConfig, notes: RowNotes) -> Iterator[PreferenceGroup]:
    return read_groups(
        source, pairing=data.pairing, min_margin=data.min_margin, strict=data.strict, notes=notes
    )


def _listed(counts: dict[str, int]) -> str:
    dropped = [f"{number} {reason.removeprefix('dropped/')}" for reason, number in counts.items() if number]
    return ", ".join(dropped) or "the source is empty"
