"""Tokenized groups on disk, memory-mapped: tokenized once by one rank, shared by all ranks and later runs.

A folder holds flat arrays, and a group is a view into them. It appears in one rename, complete, and is named
by a digest of everything that decides its content (source bytes, tokenizer, options): it is never stale and
can be deleted at any time.
"""

import hashlib
import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo.data.notes import SourceGroups
from dpo.data.plan import Sizes
from dpo.data.records import KEY_BYTES, NO_RIVAL, Pair, TokenIds, TokenizedGroup, num_trained, sequence_key
from dpo.data.trees import Layout
from dpo.files import atomic_folder

FORMAT_VERSION = 4
"""Version of the files in a folder; part of every digest that names one, so another version is not read."""
TOKENS = "tokens.bin"
COUNTS = "counts.json"
SOURCES = "sources.json"
ARRAYS = {
    "segment_offsets": True,
    "group_segments": True,
    "pairs": False,
    "group_pairs": True,
    "margins": False,
    "quantiles": False,
    "keys": False,
}
"""The arrays of a folder -> whether it holds places, which start at 0, in another array."""
READ_ONLY = "tokens_not_trained"
"""In counts: tokens of completions that are read and not trained on; not there where there are none."""
LARGEST = "largest_id"  # in that file; an earlier version did not write it


@dataclass(frozen=True, kw_only=True)
class TokenizedDataset:
    """G groups in flat arrays. Segment 0 of a group is its prompt, the others are its completions.

    A sequence is a prompt with one of its completions; the S sequences of all groups are numbered in order.
    P is the number of pairs of all groups.
    """

    path: Path
    digest: str
    """SHA-256 (hex) of what decides the content: source bytes, tokenizer and options."""
    counts: dict[str, int]
    """groups, pairs, tokens, and what was dropped or truncated, by reason."""
    sources: tuple[SourceGroups, ...]
    """In the order of their groups; empty where the writer named none."""
    largest_id: int
    """The largest token id; -1 without tokens."""
    tokens: npt.NDArray[np.int32]
    """Token ids of all segments, one segment after the other."""
    segment_offsets: npt.NDArray[np.int64]
    """Segment i is tokens[segment_offsets[i] : segment_offsets[i + 1]]."""
    group_segments: npt.NDArray[np.int64]
    """(G + 1,) first segment of each group."""
    pairs: npt.NDArray[np.int32]
    """(P, 2) completion indices within the group, `NO_RIVAL` for the side that a label does not have."""
    group_pairs: npt.NDArray[np.int64]
    """(G + 1,) first pair of each group."""
    margins: npt.NDArray[np.float64]
    """(P,) score of the chosen minus score of the rejected completion; NaN where the data has no scores."""
    quantiles: npt.NDArray[np.float64]
    """(S,) share of the reference's completions that score no more than this one; NaN without scores."""
    keys: npt.NDArray[np.void]
    """(S,) content key of each sequence, dtype V16."""

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.group_segments) - 1

    def __getitem__(self, index: int) -> TokenizedGroup:
        """The group, as views into the mapped arrays."""
        first, end = int(self.group_segments[index]), int(self.group_segments[index + 1])
        cuts = self.segment_offsets[first : end + 1]
        segments = [self.tokens[start:stop] for start, stop in pairwise(cuts)]
        mine = slice(int(self.group_pairs[index]), int(self.group_pairs[index + 1]))
        margins = tuple(self.margins[mine].tolist())
        scored = bool(margins) and not any(map(math.isnan, margins))
        start = first - index  # each group before it has one segment that is no sequence
        shares = tuple(self.quantiles[start : start + len(segments) - 1].tolist())
        return TokenizedGroup(
            prompt=segments[0],
            completions=tuple(segments[1:]),
            pairs=tuple(Pair(chosen, rejected) for chosen, rejected in self.pairs[mine].tolist()),
            margins=margins if scored else None,
            quantiles=shares if scored else None,
        )

    def content_digest(self) -> str:
        """SHA-256 (hex) of sequences, groups and pairs in their order, whichever files they came from."""
        content = hashlib.sha256()
        for part in (self.keys, self.group_segments, self.pairs, self.group_pairs):
            content.update(np.ascontiguousarray(part).tobytes())
        return content.hexdigest()

    def margins_digest(self) -> str:
        """SHA-256 (hex) of the pairs' score margins, for losses that weight pairs by them."""
        return hashlib.sha256(np.ascontiguousarray(self.margins).tobytes()).hexdigest()

    def quantiles_digest(self) -> str:
        """SHA-256 (hex) of the completions' quantiles, for losses that learn them."""
        return hashlib.sha256(np.ascontiguousarray(self.quantiles).tobytes()).hexdigest()

    @cached_property
    def has_rivals(self) -> npt.NDArray[np.bool_]:
        """(P,) whether both sides are there, instead of a completion with a label."""
        return np.asarray((self.pairs != NO_RIVAL).all(axis=1))

    @property
    def contents(self) -> str:
        """Pairs, labels and prompts, for people."""
        labelled, of = self.pairs[~self.has_rivals], f"of {len(self)} prompts"
        parts = [f"{len(self.pairs) - len(labelled)} pairs"] if len(labelled) < len(self.pairs) else []
        if len(labelled):
            desirable = int((labelled[:, 0] != NO_RIVAL).sum())
            parts.append(f"{len(labelled)} labelled completions, {desirable} of them desirable,")
        return f"{' and '.join(parts) or '0 pairs'} {of}"

    @cached_property
    def pairs_per_group(self) -> npt.NDArray[np.int64]:
        """(G,) number of pairs of each group."""
        return np.diff(self.group_pairs)

    @cached_property
    def sequences_per_group(self) -> npt.NDArray[np.int64]:
        """(G,) number of sequences of each group."""
        return np.diff(self.group_segments) - 1

    @cached_property
    def first_sequence(self) -> npt.NDArray[np.int64]:
        """(G,) index of each group's first sequence."""
        # Each group before it has one segment that is a prompt and so no sequence.
        return self.group_segments[:-1] - np.arange(len(self))

    @cached_property
    def completion_lengths(self) -> npt.NDArray[np.int64]:
        """(S,) tokens of each sequence's completion, trained on or not."""
        return np.delete(np.diff(self.segment_offsets), self.group_segments[:-1])

    @cached_property
    def completion_tokens(self) -> npt.NDArray[np.int64]:
        """(S,) tokens of each sequence's completion that are trained on."""
        if not self.counts.get(READ_ONLY):
            return self.completion_lengths
        trained = np.add.reduceat(self.tokens >= 0, self.segment_offsets[:-1], dtype=np.int64)
        return np.delete(trained, self.group_segments[:-1])

    def values_of(self, values: npt.NDArray[Any], groups: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """The values of these groups' sequences, or of their completion tokens, one group after the other.

        Args:
            values: (S,) one value per sequence, or (N,) one per completion token, of the whole data set.
            groups: Indices of groups, in the order of the result.

        Returns:
            (s,) or (n,) float64, where these groups have s sequences with n completion tokens.
        """
        first, end = self.first_sequence[groups], (self.first_sequence + self.sequences_per_group)[groups]
        if len(values) != len(self.keys):
            first, end = self.completion_offsets[first], self.completion_offsets[end]
        parts = [values[start:stop] for start, stop in zip(first, end, strict=True)]
        return np.concatenate(parts).astype(np.float64) if parts else np.zeros(0)

    @cached_property
    def completion_offsets(self) -> npt.NDArray[np.int64]:
        """(S + 1,) index of each sequence's first completion token among all completion tokens."""
        return np.concatenate([[0], np.cumsum(self.completion_tokens)])

    @cached_property
    def sequence_tokens(self) -> npt.NDArray[np.int64]:
        """(S,) tokens of each sequence, prompt and completion."""
        prompts = np.diff(self.segment_offsets)[self.group_segments[:-1]]
        return np.asarray(
            self.completion_lengths + np.repeat(prompts, self.sequences_per_group), dtype=np.int64
        )

    def sequence(self, index: int) -> tuple[TokenIds, TokenIds]:
        """(prompt, completion) of one sequence."""
        group = int(np.searchsorted(self.first_sequence, index, side="right")) - 1
        tokenized = self[group]
        return tokenized.prompt, tokenized.completions[index - int(self.first_sequence[group])]

    @cached_property
    def tree_tokens(self) -> npt.NDArray[np.int64]:
        """(G,) tokens of each group's tree, in which the prompt occurs once."""
        return np.diff(self.segment_offsets[self.group_segments])

    def sizes(self, groups: npt.NDArray[np.int64], layout: Layout) -> Sizes:
        """Rows and tokens of these groups in a batch of this layout."""
        if layout == "rows":
            return Sizes(rows=self.sequences_per_group[groups], width=self.longest[groups], padded=True)
        return Sizes(rows=np.ones_like(groups), width=self.tree_tokens[groups], padded=layout == "trees")

    @cached_property
    def longest(self) -> npt.NDArray[np.int64]:
        """(G,) tokens of each group's longest sequence."""
        return np.maximum.reduceat(self.sequence_tokens, self.first_sequence)


def is_written(folder: Path) -> bool:
    """Whether `write_dataset` has written this folder."""
    return (folder / COUNTS).is_file()


def write_dataset(groups: Iterable[TokenizedGroup], folder: Path, counts: Counter[str]) -> None:
    """Writes a data set; a reader sees all of it or nothing.

    If another process writes the same folder at the same time, the one that finishes first wins, and the
    other's copy, which has the same content, is dropped.

    Args:
        groups: A stream; only offsets and keys are held in memory.
        folder: The final place. If it is there and complete it stays as it is.
        counts: What was dropped and truncated; groups, pairs and tokens are added.
    """
    with new_dataset(folder) as building:
        write_arrays(groups, building, counts)


@contextmanager
def new_dataset(folder: Path) -> Iterator[Path]:
    """The folder of a data set while it is written; see `write_dataset`."""
    damaged = folder.is_dir() and not is_written(folder)  # something deleted files in it
    with atomic_folder(folder, replace=damaged) as building:
        yield building


def write_arrays(groups: Iterable[TokenizedGroup], building: Path, counts: Counter[str]) -> None:
    """Writes the arrays and counts of groups into a folder; see `write_dataset`."""
    segment_offsets, group_segments, margins = array("q", [0]), array("q", [0]), array("d")
    pairs, group_pairs, keys, quantiles = array("i"), array("q", [0]), bytearray(), array("d")
    largest, read_only = -1, 0
    with (building / TOKENS).open("wb") as file:
        for group in groups:
            for segment in (group.prompt, *group.completions):
                file.write(np.ascontiguousarray(segment, dtype="<i4").tobytes())
                segment_offsets.append(segment_offsets[-1] + len(segment))
                largest = max(largest, int(segment.max(initial=-1)), int((~segment).max(initial=-1)))
                read_only += len(segment) - num_trained(segment)
            for completion in group.completions:
                keys += sequence_key(group.prompt, completion)
            for pair in group.pairs:
                pairs.extend(pair)
            margins.extend(group.margins or [math.nan] * len(group.pairs))
            quantiles.extend(group.quantiles or [math.nan] * len(group.completions))
            group_segments.append(len(segment_offsets) - 1)
            group_pairs.append(len(pairs) // 2)
    np.save(building / "segment_offsets.npy", np.frombuffer(segment_offsets, dtype=np.int64))
    np.save(building / "group_segments.npy", np.frombuffer(group_segments, dtype=np.int64))
    np.save(building / "pairs.npy", np.asarray(pairs, dtype=np.int32).reshape(-1, 2))
    np.save(building / "group_pairs.npy", np.frombuffer(group_pairs, dtype=np.int64))
    np.save(building / "margins.npy", np.frombuffer(margins, dtype=np.float64))
    np.save(building / "quantiles.npy", np.frombuffer(quantiles, dtype=np.float64))
    np.save(building / "keys.npy", np.frombuffer(bytes(keys), dtype=f"V{KEY_BYTES}"))
    counts.update(groups=len(group_segments) - 1, pairs=len(pairs) // 2, tokens=segment_offsets[-1])
    if read_only:
        counts[READ_ONLY] += read_only
    described = {LARGEST: largest, **dict(sorted(counts.items()))}
    (building / COUNTS).write_text(json.dumps(described, indent=2))


def map_dataset(folder: Path, digest: str) -> TokenizedDataset:
    """Maps the arrays of a folder that `write_dataset` wrote.

    Args:
        folder: The folder.
        digest: Of what decides its content.
    """
    file = folder / TOKENS
    tokens = np.memmap(file, dtype="<i4", mode="r") if file.stat().st_size else np.zeros(0, np.int32)
    counts = json.loads((folder / COUNTS).read_text())
    largest = counts.pop(LARGEST, None)
    arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
    named = json.loads((folder / SOURCES).read_text()) if (folder / SOURCES).is_file() else []
    return TokenizedDataset(
        path=folder,
        digest=digest,
        counts=counts,
        largest_id=int(tokens.max(initial=-1)) if largest is None else largest,
        sources=tuple(map(SourceGroups.of, named)),
        tokens=tokens,
        **arrays,
    )
