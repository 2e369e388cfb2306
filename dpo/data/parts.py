"""A data set that is tokenized in parts, each a block of rows, by all cores of all nodes, and then joined.

The parts depend on the data alone, so the result is the same for any number of processes and nodes. A part
appears complete or not at all: a build that was killed goes on from those that it finished.
"""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo import distributed, terminal
from dpo.config import DataConfig
from dpo.data.blocks import Block
from dpo.data.dataset import (
    ARRAYS,
    COUNTS,
    LARGEST,
    SOURCES,
    TOKENS,
    is_written,
    new_dataset,
    write_arrays,
)
from dpo.data.notes import RowNotes, SourceGroups
from dpo.data.records import PreferenceGroup
from dpo.data.rows import read_groups
from dpo.data.sources import PreferenceSource, blocks
from dpo.data.tokenize import TokenizeOptions, tokenize_groups
from dpo.data.workers import map_in_order
from dpo.errors import UserError

WEIGHT_SEED = 0  # weight 0.5 takes the same half of a source in every run
_NOTES = "notes.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What decides the token ids of a split, besides its rows."""

    sources: Sequence[PreferenceSource]
    data: DataConfig
    max_length: int
    """Longest prompt + completion, in tokens."""
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    """Of the whole data set; its parts lie beside it."""

    @property
    def parts(self) -> Path:
        """The folder of the parts."""
        return self.folder.with_name(f"{self.folder.name}.parts")


class Part(NamedTuple):
    """A block of a source."""

    number: int
    """Among all parts of the data set."""
    source: int
    """Number of the source."""
    place: int
    """Number of the block in the source."""
    block: Block


def build_dataset(recipe: Recipe, split: str) -> None:
    """Tokenizes what is not there yet and joins it. All ranks must call it.

    Raises:
        UserError: A damaged file, a full disk or, with `strict`, a faulty row.
    """
    num_parts = distributed.on_each_node(lambda node, nodes: _write_parts(recipe, split, node, nodes))
    distributed.on_main(lambda: _join(recipe, num_parts))


def weighted_groups(
    source: PreferenceSource, place: int, block: Block, data: DataConfig, notes: RowNotes
) -> Iterator[PreferenceGroup]:
    """The groups of a block: each floor(weight) times, and once more with the probability that is left.

    Args:
        source: Says the weight and the names of columns.
        place: Number of the block in the source.
        block: Of the source.
        data: How rows become groups.
        notes: Counts dropped rows and unused columns.
    """
    weight, generator = source.options.weight, np.random.default_rng(WEIGHT_SEED + place)
    for group in groups_of(source, block, data, notes):
        for _ in range(int(weight + generator.random())):
            yield group


def groups_of(
    source: PreferenceSource, block: Block, data: DataConfig, notes: RowNotes
) -> Iterator[PreferenceGroup]:
    """The groups of a block, each once; arguments as for `weighted_groups`."""
    return read_groups(
        block.rows(),
        pairing=data.pairing,
        min_margin=data.min_margin,
        strict=data.strict,
        columns=source.options.columns,
        notes=notes,
    )


def options_for(source: PreferenceSource, data: DataConfig, max_length: int) -> TokenizeOptions:
    """How the groups of a source become token ids.

    Args:
        source: Its manifest says whether completions end with EOS, unless `data.append_eos` does.
        data: The options.
        max_length: Longest prompt + completion, in tokens.
    """
    complete = source.completions_are_complete
    return TokenizeOptions(
        max_length=max_length,
        max_prompt_length=data.max_prompt_length,
        drop_too_long=data.too_long == "drop",
        append_eos=data.append_eos if data.append_eos is not None else complete is not False,
        group_pairs=data.group_pairs,
    )


def _parts(recipe: Recipe) -> Iterator[Part]:
    count = itertools.count()
    for index, source in enumerate(recipe.sources):
        for place, block in enumerate(blocks(source)):
            yield Part(next(count), index, place, block)


def _write_parts(recipe: Recipe, split: str, node: int, nodes: int) -> int:
    """Writes this node's share of the parts: every `nodes`-th, as far as they are missing.

    Returns:
        The number of all parts.
    """
    num_parts = 0
    total = sum(file.stat().st_size for source in recipe.sources for file in source.files) // nodes
    with terminal.bar(total, description=f"tokenize {split}", unit="B", unit_scale=True, leave=False) as bar:

        def missing() -> Iterator[Part]:
            nonlocal num_parts
            for part in _parts(recipe):
                num_parts = part.number + 1
                if part.number % nodes == node:
                    if is_written(recipe.folder):
                        return  # by another job
                    if is_written(_folder_of(part, recipe)):
                        bar.update(part.block.num_bytes)
                    else:
                        yield part

        for num_bytes in map_in_order(_write_part, recipe, missing(), num_workers=recipe.data.num_workers):
            bar.update(num_bytes)
    return num_parts


def _folder_of(part: Part, recipe: Recipe) -> Path:
    return recipe.parts / f"{part.number:06}-{part.source}"


def _write_part(recipe: Recipe, part: Part) -> int:
    """Tokenizes a block; returns its size in bytes."""
    source, notes, counts = recipe.sources[part.source], RowNotes(), Counter[str]()
    groups = weighted_groups(source, part.place, part.block, recipe.data, notes)
    options = options_for(source, recipe.data, recipe.max_length)
    try:
        with new_dataset(_folder_of(part, recipe)) as building:
            write_arrays(tokenize_groups(groups, recipe.tokenizer, options, counts, notes), building, counts)
            (building / _NOTES).write_text(json.dumps(notes.plain()))
    except OSError as error:
        if not is_written(recipe.folder):  # another job has finished, and removed the parts
            raise _not_written(recipe, error) from error
    return part.block.num_bytes


def _join(recipe: Recipe, num_parts: int) -> None:
    """The data set of all parts, which are removed."""
    if not is_written(recipe.folder):
        try:
            parts = sorted(path for path in recipe.parts.glob("[0-9]*") if is_written(path))
            if len(parts) != num_parts:
                raise FileNotFoundError(f"{recipe.parts}: {len(parts)} of {num_parts} parts are there")
            with new_dataset(recipe.folder) as building:
                if parts:
                    _join_arrays(parts, building)
                else:
                    write_arrays([], building, Counter())
                _describe(recipe, parts, building)
        except OSError as error:
            if not is_written(recipe.folder):  # as above
                raise _not_written(recipe, error) from error
    shutil.rmtree(recipe.parts, ignore_errors=True)


def _not_written(recipe: Recipe, error: OSError) -> UserError:
    return UserError(
        f"data.cache_dir: cannot write the token ids to {recipe.folder} ({error.strerror or error}); make "
        "room, or choose another folder. The same command goes on from the parts that are finished"
    )


def _describe(recipe: Recipe, parts: Sequence[Path], building: Path) -> None:
    """Writes counts, and what of each source is used."""
    counts, largest = Counter[str](), -1
    groups, notes = Counter[int](), [RowNotes() for _ in recipe.sources]
    for part in parts:
        found, source = json.loads((part / COUNTS).read_text()), int(part.name.partition("-")[2])
        largest = max(largest, found.pop(LARGEST))
        counts.update(found)
        groups[source] += found["groups"]
        notes[source].add(RowNotes.of(json.loads((part / _NOTES).read_text())))
    for of_source in notes:
        counts.update({f"dropped/{reason}": number for reason, number in of_source.drops.items()})
    named = [
        SourceGroups(source.path, groups[number], found, tuple(map(str, source.files))).plain()
        for number, (source, found) in enumerate(zip(recipe.sources, notes, strict=True))
    ]
    described = {LARGEST: largest, "groups": 0, "pairs": 0, "tokens": 0, **dict(sorted(counts.items()))}
    (building / COUNTS).write_text(json.dumps(described, indent=2))
    (building / SOURCES).write_text(json.dumps(named))


def _join_arrays(parts: Sequence[Path], building: Path) -> None:
    """The arrays of all parts, one after the other; memory does not grow with them."""
    with (building / TOKENS).open("wb") as joined:
        for part in parts:
            with (part / TOKENS).open("rb") as file:
                shutil.copyfileobj(file, joined, 1 << 20)
    for name, from_zero in ARRAYS.items():
        arrays = [np.load(part / f"{name}.npy", mmap_mode="r") for part in parts]
        shape = (sum(map(len, arrays)) - from_zero * (len(arrays) - 1), *arrays[0].shape[1:])
        whole = np.lib.format.open_memmap(building / f"{name}.npy", "w+", arrays[0].dtype, shape)
        place, base = 0, 0
        for array in arrays:
            end = place + len(array)
            whole[place:end] = array + base if from_zero else array
            place, base = end - from_zero, int(whole[end - 1]) if from_zero else 0
        whole.flush()
