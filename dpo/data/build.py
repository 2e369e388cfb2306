"""The data sets that a configuration names, in token ids: read, weighted, filtered, truncated, tokenized.

They are tokenized once, for all ranks and for every later run with the same content and options. What is
written is named by a digest of everything that decides it, so a folder is never stale.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpo import distributed, terminal
from dpo.config import DataConfig, sources_of
from dpo.data.dataset import FORMAT_VERSION, TokenizedDataset, is_written, map_dataset
from dpo.data.mismatched import with_mismatched
from dpo.data.parts import Recipe, build_dataset
from dpo.data.sources import PreferenceSource, counterpart, open_source
from dpo.data.tokenize import tokenizer_digest
from dpo.errors import UserError

DEFAULT_MAX_LENGTH = 1024
READER_VERSION = 6
"""Part of the digest of tokenized data: what an earlier version read, encoded or noted is made again."""


def open_datasets(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, positions: int | None, *, mismatched: bool = False
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Training and held-out preferences in token ids; what is not there yet is tokenized by all nodes.

    Args:
        data: Where the data is and how it becomes token ids.
        tokenizer: The policy's tokenizer.
        positions: The model's longest sequence in tokens, or None without a limit.
        mismatched: Give each prompt a completion of another one too; see `dpo.data.mismatched`.

    Raises:
        UserError: Missing or malformed data, nothing left after filtering, or lengths beyond the model's.
    """
    max_length = resolve_max_length(data.max_length, positions)
    check_prompt_length(data, max_length)
    train_sources, test_sources = distributed.on_main(lambda: (train_sources_of(data), test_sources_of(data)))
    terminal.warning(*same_data(train_sources, test_sources))
    train = _open(train_sources, data, max_length, tokenizer, "train")
    test = _open(test_sources, data, max_length, tokenizer, "test") if test_sources else None
    if mismatched:
        train = with_mismatched(train, "data.train")
        test = None if test is None else with_mismatched(test, "data.test")
    return train, test


def resolve_max_length(max_length: int | None, positions: int | None) -> int:
    """`data.max_length` or its default, in tokens; UserError if it exceeds the model's positions."""
    if max_length is None:
        return min(DEFAULT_MAX_LENGTH, positions or DEFAULT_MAX_LENGTH)
    if positions is not None and max_length > positions:
        raise UserError(f"data.max_length: {max_length}; the model has {positions} positions: lower it")
    return max_length


def check_prompt_length(data: DataConfig, max_length: int) -> None:
    """Raises UserError if no completion would be left."""
    if data.max_prompt_length is not None and data.max_prompt_length >= max_length:
        raise UserError(
            f"data.max_prompt_length: {data.max_prompt_length}; expected less than {max_length}, the longest "
            "prompt + completion: lower it, or set data.max_length"
        )


def train_sources_of(data: DataConfig) -> list[PreferenceSource]:
    """The training sources. Raises UserError."""
    downloads = Path(data.cache_dir) / "downloads"
    return [
        open_source(named, "train", key="data.train", downloads=downloads) for named in sources_of(data.train)
    ]


def test_sources_of(data: DataConfig) -> list[PreferenceSource]:
    """The held-out sources: data.test, or the parts beside the sources of data.train. Raises UserError."""
    downloads = Path(data.cache_dir) / "downloads"
    if data.test is not None:
        return [
            open_source(named, "test", key="data.test", downloads=downloads)
            for named in sources_of(data.test)
        ]
    beside = [other for named in sources_of(data.train) if (other := counterpart(named)) is not None]
    return [open_source(named, "test", key="data.train", downloads=downloads) for named in beside]


def same_data(train: list[PreferenceSource], test: list[PreferenceSource]) -> list[str]:
    """Warnings of held-out data that is training data."""
    same = {source.fingerprint for source in train}
    return [
        f"data.test: {source.path} has the content of data.train; held-out metrics say nothing then"
        for source in test
        if source.fingerprint in same
    ]


def _open(
    sources: list[PreferenceSource],
    data: DataConfig,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    split: str,
) -> TokenizedDataset:
    digest = _digest(sources, data, max_length, tokenizer)
    folder = Path(data.cache_dir) / digest[:16]
    if not distributed.on_main(lambda: is_written(folder)):
        recipe = Recipe(sources=sources, data=data, max_length=max_length, tokenizer=tokenizer, folder=folder)
        build_dataset(recipe, split)
    dataset = map_dataset(folder, digest)
    read = [  # under today's names: the folder may be of files that had others
        written.named(source.path, [str(file) for file in source.files])
        for written, source in zip(dataset.sources, sources, strict=True)
    ]
    for source in read if data.strict else ():
        if source.notes.first_fault:
            raise UserError(source.notes.first_fault)
    notes = [line for source in read for line in source.notes.lines(source.name)]
    if len(dataset) == 0:
        names = ", ".join(source.path for source in sources)
        what = f"data.{split}: {names}: nothing left after filtering: {listed(dataset.counts)}"
        raise UserError("\n".join([what, *notes]))
    terminal.note(*notes)
    terminal.warning(*(line for source in read for line in source.notes.warnings(source.name)))
    return replace(dataset, sources=tuple(read))


def _digest(
    sources: list[PreferenceSource], data: DataConfig, max_length: int, tokenizer: PreTrainedTokenizerBase
) -> str:
    """SHA-256 (hex) of everything that decides the tokenized data."""
    decisive = {
        "format": FORMAT_VERSION,
        "reader": READER_VERSION,
        "sources": [(source.fingerprint, source.options.weight) for source in sources],
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": max_length,
        "options": {
            key: value
            for key, value in asdict(data).items()
            if key not in ("train", "test", "strict", "cache_dir", "num_workers")
        },
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def listed(counts: Mapping[str, int]) -> str:
    """Dropped rows by reason, in one line."""
    dropped = [f"{number} {reason.removeprefix('dropped/')}" for reason, number in counts.items() if number]
    return ", ".join(dropped) or "the source is empty"
