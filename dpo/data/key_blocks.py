"""Which blocks of keys each block of queries attends to, from the lengths of segments alone.

FlexAttention skips blocks of 128 x 128 scores that no token needs. Its own `create_block_mask` evaluates the
mask for every pair of tokens, 12 bytes x T^2. Here only runs of tokens are compared, each within one segment
and one block, so that nothing of size T x T is made. `TreeBatch.to` calls it in the prefetching thread.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FLEX_BLOCK = 128
"""Tokens of a block of queries, and of keys: FlexAttention's default."""

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class KeyBlocks(NamedTuple):
    """For each of K blocks of queries, the blocks of keys to compute; arguments of `from_kv_blocks`."""

    partial_counts: Tensor
    """(1, 1, K) int32: number of blocks that some but not all tokens attend to."""
    partial: Tensor
    """(1, 1, K, K) int32: their numbers, then those of the other blocks, both ascending."""
    full_counts: Tensor
    """(1, 1, K) int32: number of blocks that every token attends to, so that no mask is needed."""
    full: Tensor
    """(1, 1, K, K) int32: their numbers, then those of the other blocks."""


def key_blocks(trees: Sequence[Sequence[int]], width: int, window: int | None) -> KeyBlocks:
    """The blocks of a row of packed trees.

    Args:
        trees: Number of tokens of each segment of each tree, the prompt first, as in `TreeBatch.trees`.
        width: Tokens of the row with its padding, a multiple of `FLEX_BLOCK`. Padding attends to itself.
        window: Number of positions that a token looks back, its own included; None without a limit.
    """
    runs = _runs(trees, width)
    num_blocks = width // FLEX_BLOCK
    of_query, of_key = _related(runs)
    nearest = runs.first[of_query] - runs.last[of_key]
    farthest = runs.last[of_query] - runs.first[of_key]
    limit = width if window is None else window
    some = (farthest >= 0) & (nearest < limit)  # every distance between the two occurs
    every = (nearest >= 0) & (farthest < limit)
    cells = runs.block[of_query] * num_blocks + runs.block[of_key]
    areas = runs.size[of_query] * runs.size[of_key]
    seen = np.bincount(cells[some], minlength=num_blocks**2).reshape(num_blocks, num_blocks) > 0
    whole = np.bincount(cells[every], areas[every], num_blocks**2).reshape(num_blocks, num_blocks)
    full = whole == FLEX_BLOCK**2
    return KeyBlocks(*_ordered(seen & ~full), *_ordered(full))


class _Runs(NamedTuple):
    """Runs of consecutive tokens, each within one segment and one block, in the order of the row."""

    size: Int64s
    """Number of tokens."""
    block: Int64s
    """Number of the block."""
    segment: Int64s
    """Number of the segment; padding is the last segment."""
    prompt: Int64s
    """Number of the segment of its prompt; its own number for prompts and padding."""
    first: Int64s
    """Position of its first token in the sequence."""
    last: Int64s
    """Position of its last token."""


def _runs(trees: Sequence[Sequence[int]], width: int) -> _Runs:
    sizes = np.array(list(chain.from_iterable(trees)))
    per_tree = np.array([len(tree) for tree in trees])
    prompt_of = np.append(np.repeat(np.cumsum(per_tree) - per_tree, per_tree), len(sizes))
    padding = len(sizes)
    sizes = np.append(sizes, width - sizes.sum())
    starts = np.cumsum(sizes) - sizes
    begin = np.union1d(starts[sizes > 0], np.arange(0, width, FLEX_BLOCK))
    size = np.diff(begin, append=width)
    segment = np.searchsorted(starts, begin, side="right") - 1
    prompt = prompt_of[segment]
    first = begin - starts[segment] + np.where(segment == prompt, 0, sizes[prompt])
    last = first + size - 1
    first[segment == padding] = last[segment == padding] = 0  # positions of padding are 0
    return _Runs(size, begin // FLEX_BLOCK, segment, prompt, first, last)


def _related(runs: _Runs) -> tuple[Int64s, Int64s]:
    """Pairs of runs (query, key) whose key is in the query's segment or in its prompt."""
    queries, keys = [], []
    everyone = np.arange(len(runs.size))
    for of, wanted in ((everyone, runs.segment), (everyone[runs.segment != runs.prompt], runs.prompt)):
        start = np.searchsorted(runs.segment, wanted[of], side="left")
        count = np.searchsorted(runs.segment, wanted[of], side="right") - start
        queries.append(np.repeat(of, count))
        keys.append(np.arange(count.sum()) + np.repeat(start - (np.cumsum(count) - count), count))
    return np.concatenate(queries), np.concatenate(keys)


def _ordered(chosen: Bools) -> tuple[Tensor, Tensor]:
    """Counts and numbers of the chosen blocks of each row, as FlexAttention stores them."""
    numbers = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
    counts = chosen.sum(1, dtype=np.int32)
    return torch.from_numpy(counts)[None, None], torch.from_numpy(numbers)[None, None]
