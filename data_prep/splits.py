"""Which groups are for training and which are held out: by the input's test split, or by a hash of a key.

The key is the prompt, or a dialogue's first turn; none is in both splits. A split by hash holds out a share
of the keys or one of several folds. It depends only on key and seed, not on order or other rows.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

import yaml

from data_prep.files import Split, describe_file
from dpo.config import DataSource
from dpo.data.dialogue import ends_with_answer
from dpo.data.fields import RowError
from dpo.data.notes import RowNotes
from dpo.data.records import PreferenceGroup
from dpo.data.rows import convert_rows
from dpo.data.sources import PreferenceSource, counterpart, open_source, read_rows
from dpo.errors import UserError

Rows = Iterable[tuple[str, Any]]
"""Raw rows, each with its place, for messages."""


class Fold(NamedTuple):
    """One of several equal parts of the keys, for cross-validation."""

    number: int
    """From 1 to `of`."""
    of: int

    def part(self) -> tuple[float, float]:
        """The interval that `split_of` holds out. Every key is in exactly one of the folds of a seed."""
        return (self.number - 1) / self.of, self.number / self.of


def part_of(text: str) -> Fold:
    """`K/N` of the command line; argparse shows what is wrong with it."""
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of) and int(of) >= 2):
        raise argparse.ArgumentTypeError(
            f"{text}; expected K/N with 1 <= K <= N and N at least 2, such as 1/5"
        )
    return Fold(int(number), int(of))


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """The data that a source reads."""

    train: Sequence[PreferenceSource]
    """Training data, or all data where there is no separate test data."""
    test: Sequence[PreferenceSource]
    """Held-out data; empty where the training data is split."""

    def rows(self) -> dict[Split, Rows]:
        """The raw rows of each split, with their places."""
        rows: dict[Split, Rows] = {"train": chain.from_iterable(map(read_rows, self.train))}
        if self.test:
            rows["test"] = chain.from_iterable(map(read_rows, self.test))
        return rows

    def describe(self) -> list[dict[str, Any]]:
        """Name, size and digest of each file, or name, split and fingerprint of a hub data set."""
        descriptions = []
        for source in (*self.train, *self.test):
            hub = {"name": source.path, "split": source.split, "fingerprint": source.fingerprint}
            descriptions.extend([describe_file(file) for file in source.files] or [hub])
        return descriptions


def source_of(text: str) -> DataSource:
    """An input: a path, a hub name, or a source with options as in data.train, {path: ..., split: ...}.

    Raises:
        UserError: Options that a source does not have, or that data_prep does not use.
    """
    if not text.startswith("{"):
        return DataSource(path=text)
    try:
        source = DataSource(**yaml.safe_load(text))
    except (yaml.YAMLError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"input: {text}: {reason}; expected {{path: ..., split: ...}}") from error
    if source.columns:
        raise UserError(f"input: columns: {source.columns}; give --columns of the source preferences instead")
    if source.weight != 1:
        raise UserError(f"input: weight: {source.weight}; training takes weights, data_prep keeps every row")
    return source


def open_inputs(train: Sequence[str], test: Sequence[str]) -> Inputs:
    """Opens the inputs; without `test`, with the test splits of the training inputs.

    Raises:
        UserError: One of them does not exist.
    """
    named = [source_of(text) for text in train]
    beside = [part for source in named if (part := counterpart(source)) is not None]
    held_out = [source_of(text) for text in test] or beside
    return Inputs(
        train=[open_source(source, "train", key="input") for source in named],
        test=[open_source(source, "test", key="--test") for source in held_out],
    )


def read_inputs(
    inputs: Inputs,
    convert: Callable[[Any], PreferenceGroup],
    key: Callable[[PreferenceGroup], str],
    *,
    args: argparse.Namespace,
    notes: RowNotes,
) -> Iterator[tuple[Split, PreferenceGroup]]:
    """Streams every group of the inputs with its split; arguments as for `split_groups`."""
    return split_groups(inputs.rows(), convert, key, args=args, notes=notes)


def split_groups(
    rows: Mapping[Split, Rows],
    convert: Callable[[Any], PreferenceGroup],
    key: Callable[[PreferenceGroup], str],
    *,
    args: argparse.Namespace,
    notes: RowNotes,
) -> Iterator[tuple[Split, PreferenceGroup]]:
    """Streams every group with its split; test rows with the key of a training row are dropped.

    Args:
        rows: The raw rows, "train" and "test"; without "test" the training rows are split.
        convert: Makes a group of a raw row, or raises `RowError`.
        key: The key of a group; no key is in both splits.
        args: The command line: strict, max_rows, seed, fold or test_fraction.
        notes: Counts what is dropped and not used.

    Raises:
        UserError: A fold of data that has test rows.
    """

    def plain(row: Any) -> PreferenceGroup:
        group = convert(row)
        turns = [turn for turn in group.prompt if not isinstance(turn, str)]
        others = {*group.template_fields, *(key for fields in group.message_fields for key in fields)}
        others |= {key for turn in turns for key in turn} - {"role", "content"}
        if group.conversations:
            others.add("completions of several messages")
        if turns and ends_with_answer(turns) and not group.continues:
            others.add("two turns of the assistant in a row")
        if others:
            raise RowError(
                "fields_not_in_files",
                f"the row has {', '.join(sorted(others))}; preference files hold role and text of "
                "messages alone: give such data to training as it is",
            )
        return group

    def groups(split: Split) -> Iterator[PreferenceGroup]:
        return convert_rows(islice(rows[split], args.max_rows), plain, strict=args.strict, notes=notes)

    if "test" not in rows:
        held_out = args.fold.part() if args.fold else (0.0, args.test_fraction)
        for group in groups("train"):
            yield split_of(key(group), seed=args.seed, held_out=held_out), group
        return
    if args.fold:
        raise UserError("--fold: the input has a test split of its own; give its training part only")
    seen = set()
    for group in groups("train"):
        seen.add(_digest(key(group)))
        yield "train", group
    for group in groups("test"):
        if _digest(key(group)) in seen:
            notes.drops["test_prompt_in_train"] += 1
        else:
            yield "test", group


def split_of(key: str, *, seed: int, held_out: tuple[float, float]) -> Split:
    """The split of a key; depends only on key and seed.

    Args:
        key: Any text.
        seed: The hash of seed and key is a point, evenly distributed over [0, 1).
        held_out: The interval in [0, 1], its end excluded, whose points are test keys.
    """
    start, end = held_out
    place = int.from_bytes(_digest(f"{seed}\0{key}")[:8], "big")
    return "test" if start * 2**64 <= place < end * 2**64 else "train"


def prompt_key(group: PreferenceGroup) -> str:
    """A group's prompt as a key: equal prompts, equal keys."""
    return group.prompt if isinstance(group.prompt, str) else json.dumps(group.prompt)


def _digest(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=16).digest()
