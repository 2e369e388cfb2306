"""The blocks found from lengths are those that FlexAttention finds by evaluating the mask for all tokens."""

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from dpo.data.key_blocks import FLEX_BLOCK, key_blocks
from dpo.data.trees import Tree, TreeBatch, tree_batch

INDICES = [
    f"{full}{side}_{what}"
    for full in ("", "full_")
    for side in ("kv", "q")
    for what in ("num_blocks", "indices")
]
"""Every index tensor of a BlockMask."""

LENGTHS = st.one_of(st.integers(1, 6), st.integers(100, 140), st.integers(1, 500))


def batch_of(trees: list[tuple[int, list[int]]]) -> TreeBatch:
    def ids(length: int) -> np.ndarray:
        return np.ones(length, dtype=np.int32)

    made: list[Tree] = [(ids(prompt), [*map(ids, completions)]) for prompt, completions in trees]
    return tree_batch(made, "flex")


def evaluated(batch: TreeBatch, window: int | None) -> BlockMask:
    """The mask of the batch, evaluated for every pair of tokens."""
    segments, prefixes, positions = batch.segments[0], batch.prefixes[0], batch.positions[0]

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        distance = positions[query] - positions[key]
        related = (segments[key] == segments[query]) | (segments[key] == prefixes[query])
        return related & (distance >= 0) & (distance < (window or len(segments)))

    return create_block_mask(visible, None, None, len(segments), len(segments), device="cpu")


@given(
    trees=st.lists(st.tuples(LENGTHS, st.lists(LENGTHS, min_size=1, max_size=4)), min_size=1, max_size=5),
    window=st.one_of(st.none(), LENGTHS),
)
@settings(max_examples=100, deadline=None)
def test_every_index_is_that_of_create_block_mask(
    trees: list[tuple[int, list[int]]], window: int | None
) -> None:
    batch = batch_of(trees)
    width = batch.input_ids.shape[1]
    found = BlockMask.from_kv_blocks(*key_blocks(batch.trees, width, window), seq_lengths=(width, width))
    expected = evaluated(batch, window)
    assert found.shape == expected.shape
    for name in INDICES:
        ours, theirs = getattr(found, name), getattr(expected, name)
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        assert torch.equal(ours, theirs), name


def test_a_row_by_hand() -> None:
    # Prompt of two blocks, completions of one block each: the second does not attend to the first.
    found = key_blocks([(2 * FLEX_BLOCK, FLEX_BLOCK, FLEX_BLOCK)], 4 * FLEX_BLOCK, None)
    assert found.partial_counts.tolist() == [[[1, 1, 1, 1]]]  # the diagonal
    assert found.full_counts.tolist() == [[[0, 1, 2, 2]]]
    assert [row[:count] for row, count in zip(found.full[0, 0].tolist(), [0, 1, 2, 2], strict=True)] == [
        [],
        [0],
        [0, 1],
        [0, 1],
    ]


def test_an_empty_completion_and_a_batch_without_trees() -> None:
    batch = batch_of([(200, [0, 3, 0])])
    assert torch.equal(key_blocks(batch.trees, 256, None).partial, evaluated(batch, None).kv_indices)
    assert key_blocks(batch_of([]).trees, FLEX_BLOCK, None).partial_counts.tolist() == [[[1]]]


@pytest.mark.parametrize("window", [None, 512])
def test_nothing_of_all_pairs_of_tokens_is_made(window: int | None) -> None:
    tokens = 65_536
    trees = [(240, 136, 136)] * (tokens // 512)
    key_blocks(trees, tokens, window)  # imports and caches are not counted
    tracemalloc.start()
    key_blocks(trees, tokens, window)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    blocks = (tokens // FLEX_BLOCK) ** 2
    assert peak < 64 * blocks  # 17 MB; a byte per pair of tokens would be 4.3 GB
