"""The tensors of a micro-batch, literally, in each layout."""

from typing import get_args

import pytest
import torch
from groups import TOKENS, ids
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.records import Pair, TokenIds, TokenizedGroup
from dpo.data.trees import Layout, TreeBatch, group_batch, sequence_batch, tree_batch

LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def two_groups(layout: Layout) -> TreeBatch:
    first = TokenizedGroup(prompt=ids(7, 8), completions=(ids(1), ids(2, 3)), pairs=(Pair(0, 1),))
    second = TokenizedGroup(
        prompt=ids(9), completions=(ids(4), ids(5, 6), ids(4, 4, 4)), pairs=(Pair(2, 0), Pair(2, 1))
    )
    return group_batch([first, second], layout)


def test_packed_trees_follow_one_another() -> None:
    batch = two_groups("packed")
    assert batch.input_ids.tolist() == [[7, 8, 1, 2, 3, 9, 4, 5, 6, 4, 4, 4]]
    assert batch.positions.tolist() == [[0, 1, 2, 2, 3, 0, 1, 1, 2, 1, 2, 3]]
    assert batch.segments.tolist() == [[0, 0, 1, 2, 2, 3, 4, 5, 5, 6, 6, 6]]
    assert batch.prefixes.tolist() == [[0, 0, 0, 0, 0, 3, 3, 3, 3, 3, 3, 3]]
    assert batch.predicts.tolist() == [1, 1, 3, 5, 5, 7, 5, 9, 10]
    assert batch.trees == ((2, 1, 2), (1, 1, 2, 3))


def test_flex_is_packed_and_padded_to_whole_blocks() -> None:
    packed, flex = two_groups("packed"), two_groups("flex")
    assert flex.input_ids.shape == (1, 128)
    for name in ("input_ids", "positions", "segments", "prefixes"):
        assert torch.equal(getattr(flex, name)[:, :12], getattr(packed, name))
    assert set(flex.segments[0, 12:].tolist()) == {-1}
    assert torch.equal(flex.predicts, packed.predicts)


def test_trees_are_one_per_row_padded_on_the_right() -> None:
    batch = two_groups("trees")
    assert batch.input_ids.tolist() == [[7, 8, 1, 2, 3, 0, 0], [9, 4, 5, 6, 4, 4, 4]]
    assert batch.positions.tolist() == [[0, 1, 2, 2, 3, 0, 0], [0, 1, 1, 2, 1, 2, 3]]
    assert batch.segments.tolist() == [[0, 0, 1, 2, 2, -1, -1], [3, 4, 5, 5, 6, 6, 6]]
    assert batch.predicts.tolist() == [1, 1, 3, 7, 7, 9, 7, 11, 12]


def test_rows_hold_one_completion_each_after_its_own_prompt() -> None:
    batch = two_groups("rows")
    expected = [[7, 8, 1, 0], [7, 8, 2, 3], [9, 4, 0, 0], [9, 5, 6, 0], [9, 4, 4, 4]]
    assert batch.input_ids.tolist() == expected
    assert batch.input_ids.dtype == torch.int64
    assert batch.predicts.tolist() == [1, 5, 6, 8, 12, 13, 16, 17, 18]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequences_and_pairs_are_the_same_in_every_layout(layout: Layout) -> None:
    batch = two_groups(layout)
    assert batch.targets.tolist() == [1, 2, 3, 4, 5, 6, 4, 4, 4]
    assert batch.sequences.tolist() == [0, 1, 1, 2, 3, 3, 4, 4, 4]
    assert batch.num_tokens.tolist() == [1, 2, 1, 2, 3]
    assert batch.pairs.tolist() == [[0, 1], [4, 2], [4, 3]]
    assert batch.num_row_tokens == 3 + 4 + 2 + 3 + 4
    assert batch.num_real_tokens == (16 if layout == "rows" else 12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_without_trees_is_a_row_that_predicts_nothing(layout: Layout) -> None:
    for batch in (group_batch([], layout), sequence_batch([], layout)):
        assert batch.input_ids.shape == (1, 128 if layout == "flex" else 2)
        counts = (len(batch.predicts), len(batch.targets), len(batch.sequences), batch.num_real_tokens)
        assert counts == (0, 0, 0, 0)
        assert batch.num_tokens.tolist() == [0]
        assert batch.pairs.shape == (0, 2)


def test_moving_a_batch_changes_nothing() -> None:
    batch = two_groups("packed")
    moved = batch.to(torch.device("cpu"))
    for name in batch.__slots__:
        value = getattr(batch, name)
        same = torch.equal(value, getattr(moved, name)) if isinstance(value, torch.Tensor) else None
        assert same or getattr(moved, name) == value


TREES = st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=5)), min_size=1, max_size=5)


@given(TREES, st.sampled_from(LAYOUTS))
def test_a_token_attends_to_its_own_sequence_up_to_itself(
    trees: list[tuple[TokenIds, list[TokenIds]]], layout: Layout
) -> None:
    batch = tree_batch(trees, layout)
    width = batch.input_ids.shape[1]
    sequences = [(prompt, completion) for prompt, completions in trees for completion in completions]
    target = 0
    for prompt, completion in sequences:
        whole = [*prompt.tolist(), *completion.tolist()]
        for place in range(len(prompt), len(whole)):
            row, column = divmod(int(batch.predicts[target]), width)
            own, prefix = batch.segments[row, column], batch.prefixes[row, column]
            position = batch.positions[row, column]
            seen = ((batch.segments[row] == own) | (batch.segments[row] == prefix)) & (
                batch.positions[row] <= position
            )
            assert batch.input_ids[row][seen].tolist() == whole[:place]
            assert batch.positions[row][seen].tolist() == list(range(place))
            assert batch.targets[target] == whole[place]
            target += 1
    assert target == len(batch.targets)


def test_blocks_are_found_for_the_windows_that_are_asked_for_and_move_with_the_batch() -> None:
    batch = tree_batch([(ids(*[1] * 200), [ids(3), ids(*[2] * 60)])], "flex")
    moved = batch.to(torch.device("meta"), [None, 64])
    assert {*moved.blocks} == {None, 64}
    assert all(part.is_meta for blocks in moved.blocks.values() for part in blocks)
    again = batch.to(torch.device("cpu"), [64]).to(torch.device("cpu"))
    assert torch.equal(again.blocks[64].partial, batch.blocks_of(64).partial)
    assert tree_batch([(ids(1), [ids(3)])], "packed").to(torch.device("cpu"), [None]).blocks == {}
