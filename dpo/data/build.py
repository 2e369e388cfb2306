"""From the sources that a configuration names to token ids: weighted, filtered, cut, tokenized once."""

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
from dpo.data.dataset import FORMAT_VERSION, SourceGroups, TokenizedDataset, map_dataset, write_dataset
from dpo.data.records import Pair, PreferenceGroup, TokenizedGroup
from dpo.data.rows import PreferenceSource, has_split, open_source, read_groups
from dpo.data.tokenize import TokenizeOptions, tokenize_groups, tokenizer_digest
from dpo.errors import UserError

DEFAULT_MAX_LENGTH = 1024
WEIGHT_SEED = 0  # the half of a source that weight 0.5 takes is the same in every run


def open_datasets(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Training and held-out data in token ids; tokenized by rank 0 where that has not been done yet.

    Args:
        data: Where the data is and how it becomes ids.
        tokenizer: The policy's.
        positions: The model's longest sequence, or None without a limit.

    Raises:
        UserError: Missing or malformed data, nothing left, or lengths beyond the model's.
    """
    max_length = resolve_max_length(data.max_length, positions)
    if data.max_prompt_length is not None and data.max_prompt_length >= max_length:
        raise UserError(
            f"data.max_prompt_length: {data.max_prompt_length}; expected less than {max_length}, the longest "
            "prompt + completion: lower it, or set data.max_length"
        )
    train = _open(train_sources_of(data), data, max_length, tokenizer, "train")
    test_sources = test_sources_of(data)
    test = _open(test_sources, data, max_length, tokenizer, "test") if test_sources else None
    return train, test


def resolve_max_length(max_length: int | None, positions: int | None) -> int:
    """The option, or its default; UserError beyond the model's positions."""
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    if positions is not None and max_length > positions:
        raise UserError(f"data.max_length: {max_length}; the model has {positions} positions: lower it")
    return max_length


def check_sources(data: DataConfig) -> None:
    """Opens every source and reads its first group, without a tokenizer. Raises UserError."""
    for weighted in [*train_sources_of(data), *test_sources_of(data)]:
        drops: Counter[str] = Counter()
        if next(_read(weighted[0], data, drops), None) is None:
            raise UserError(f"{weighted[0].path}: nothing left after filtering: {_listed(drops)}")


Weighted = tuple[PreferenceSource, float]


def train_sources_of(data: DataConfig) -> list[Weighted]:
    """The training sources, with their weights."""
    return _sources(data.train, "train", "data.train")


def test_sources_of(data: DataConfig) -> list[Weighted]:
    """The held-out sources: data.test, or the test splits that stand beside data.train."""
    if data.test is not None:
        return _sources(data.test, "test", "data.test")
    paths = [data.train] if isinstance(data.train, str) else [source.path for source in data.train]
    return [(open_source(path, "test", key="data.train"), 1.0) for path in paths if has_split(path, "test")]


def _sources(named: str | list[DataSource], split: Literal["train", "test"], key: str) -> list[Weighted]:
    listed = [DataSource(path=named)] if isinstance(named, str) else named
    return [(open_source(source.path, split, key=key), source.weight) for source in listed]


def _place(
    sources: list[Weighted], data: DataConfig, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[Path, str]:
    """Folder of the tokenized data, and the digest that names it."""
    decisive = {
        "format": FORMAT_VERSION,
        "sources": [(source.fingerprint, weight) for source, weight in sources],
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": max_length,
        "options": {
            key: value
            for key, value in asdict(data).items()
            if key not in ("train", "test", "strict", "cache_dir")
        },
    }
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
    return Path(data.cache_dir) / digest[:16], digest


def _open(
    sources: list[Weighted],
    data: DataConfig,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
) -> TokenizedDataset:
    folder, digest = _place(sources, data, max_length, tokenizer)

    def write_once() -> None:
        if data.strict or not (folder / "counts.json").is_file():
            counts: Counter[str] = Counter()
            of_sources: list[SourceGroups] = []
            groups = _tokenized(sources, data, max_length, tokenizer, counts, of_sources, split)
            write_dataset(groups, folder, counts, of_sources)

    distributed.on_main(write_once)
    dataset = map_dataset(folder, digest)
    if len(dataset) == 0:
        named = ", ".join(str(source.path) for source, _ in sources)
        raise UserError(f"data.{split}: {named}: nothing left after filtering: {_listed(dataset.counts)}")
    return dataset


def _tokenized(
    sources: list[Weighted],
    data: DataConfig,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[str],
    of_sources: list[SourceGroups],
    split: str,
) -> Iterator[TokenizedGroup]:
    for source, weight in sources:
        number = 0
        drops: Counter[str] = Counter()
        groups = terminal.progress(
            read_weighted(source, weight, data, drops),
            description=f"tokenize {split}",
            unit="groups",
            leave=False,
        )
        for group in tokenize_source(groups, source, data, max_length, tokenizer, counts):
            number += 1
            yield group
        of_sources.append(SourceGroups(str(source.path), number))
        counts.update({f"dropped/{reason}": number for reason, number in drops.items()})


def tokenize_source(
    groups: Iterable[PreferenceGroup],
    source: PreferenceSource,
    data: DataConfig,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[str],
) -> Iterator[TokenizedGroup]:
    """Token ids of groups of one source, by the options of the data; drops and cuts are added to `counts`."""
    complete = source.completions_are_complete
    options = TokenizeOptions(
        max_length=max_length,
        max_prompt_length=data.max_prompt_length,
        drop_too_long=data.too_long == "drop",
        append_eos=data.append_eos if data.append_eos is not None else complete is not False,
    )
    for group in tokenize_groups(groups, tokenizer, options, counts):
        yield from [group] if data.group_pairs else _split(group)


def read_weighted(
    source: PreferenceSource, weight: float, data: DataConfig, drops: Counter[str]
) -> Iterator[PreferenceGroup]:
    """The source's groups in their order, as often as its weight says."""
    return _weighted(_read(source, data, drops), weight)


def _read(source: PreferenceSource, data: DataConfig, drops: Counter[str]) -> Iterator[PreferenceGroup]:
    return read_groups(
        source, pairing=data.pairing, min_margin=data.min_margin, strict=data.strict, drops=drops
    )


def _weighted(groups: Iterable[PreferenceGroup], weight: float) -> Iterator[PreferenceGroup]:
    """Each group floor(weight) times, and once more with the probability that is left."""
    generator = np.random.default_rng(WEIGHT_SEED)
    for group in groups:
        for _ in range(int(weight + generator.random())):
            yield group


def _split(group: TokenizedGroup) -> Iterator[TokenizedGroup]:
    """Every pair a group of its own."""
    for chosen, rejected in group.pairs:
        yield TokenizedGroup(
            prompt=group.prompt,
            completions=(group.completions[chosen], group.completions[rejected]),
            pairs=(Pair(0, 1),),
        )


def _listed(counts: dict[str, int]) -> str:
    dropped = [f"{number} {reason.removeprefix('dropped/')}" for reason, number in counts.items() if number]
    return ", ".join(dropped) or "the source is empty"
