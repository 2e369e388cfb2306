"""The tensors of a micro-batch, literally, in each layout."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo.data.records import Pair, TokenIds, TokenizedGroup
from dpo.data.trees import Layout, TreeBatch, group_batch, sequence_batch, tree_batch
from dpo.loss.pairs import pair_logps

LAYOUTS: tuple[Layout, ...] = get_args(Layout)


def ids(*values: int) -> TokenIds:
    return np.array(values, dtype=np.int32)


def two_groups(layout: Layout) -> TreeBatch:
    first = TokenizedGroup(prompt=ids(7, 8), completions=(ids(1), ids(2, 3)), pairs=(Pair(0, 1),))
    second = TokenizedGroup(
        prompt=ids(9), completions=(ids(4), ids(5, 6), ids(4, 4, 4)), pairs=(Pair(2, 0), Pair(2, 1))
    )
    return group_batch([first, second], layout)


def test_packed_trees_stand_one_after_the_other() -> None:
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


def test_trees_are_one_a_row_padded_on_the_right() -> None:
    batch = two_groups("trees")
    assert batch.input_ids.tolist() == [[7, 8, 1, 2, 3, 0, 0], [9, 4, 5, 6, 4, 4, 4]]
    assert batch.positions.tolist() == [[0, 1, 2, 2, 3, 0, 0], [0, 1, 1, 2, 1, 2, 3]]
    assert batch.segments.tolist() == [[0, 0, 1, 2, 2, -1, -1], [3, 4, 5, 5, 6, 6, 6]]
    assert batch.predicts.tolist() == [1, 1, 3, 7, 7, 9, 7, 11, 12]


def test_rows_hold_one_completion_each_after_a_prompt_of_its_own() -> None:
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


def test_pair_values_are_picked_by_sequence() -> None:
    batch = two_groups("packed")
    picked = pair_logps(torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]), batch.pairs, batch.num_tokens)
    assert picked.chosen.tolist() == [-1.0, -5.0, -5.0]
    assert picked.rejected.tolist() == [-2.0, -3.0, -4.0]
    assert picked.chosen_tokens.tolist() == [1, 3, 3]
    assert picked.rejected_tokens.tolist() == [2, 1, 2]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_without_work_is_a_row_that_predicts_nothing(layout: Layout) -> None:
    for batch in (group_batch([], layout), sequence_batch([], layout)):
        assert batch.input_ids.shape == (1, 128 if layout == "flex" else 2)
        counts = (len(batch.predicts), len(batch.targets), len(batch.sequences), batch.num_real_tokens)
        assert counts == (0, 0, 0, 0)
        assert batch.num_tokens.tolist() == [0]
        assert pair_logps(torch.zeros(1), batch.pairs, batch.num_tokens).chosen.shape == (0,)


def test_moving_a_batch_changes_nothing() -> None:
    batch = two_groups("packed")
    moved = batch.to(torch.device("cpu"))
    for name in batch.__slots__:
        value = getattr(batch, name)
        same = torch.equal(value, getattr(moved, name)) if isinstance(value, torch.Tensor) else None
        assert same or getattr(moved, name) == value


TOKENS = st.lists(st.integers(1, 99), min_size=1, max_size=9).map(lambda values: ids(*values))
TREES = st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=5)), min_size=1, max_size=5)


@given(TREES, st.sampled_from(LAYOUTS))
def test_what_a_token_sees_is_its_own_sequence_up_to_itself(
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


def test_tokens_beyond_the_shorter_completion_count_by_alpha() -> None:
    trees = [(ids(9), [ids(1), ids(2, 3, 4), ids(5, 6)])]
    batch = tree_batch(trees, "packed", [(1, 0), (0, 2), (1, 2)])
    logps = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], requires_grad=True)  # of the six tokens
    found = pair_logps(logps, batch.pairs, batch.num_tokens, 0.25)
    assert found.chosen.tolist() == [-2 + 0.25 * (-3 - 4), -1, -2 - 3 + 0.25 * -4]
    assert found.rejected.tolist() == [-1, -5 + 0.25 * -6, -5 - 6]
    found.chosen.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [1, 2, 1.25, 0.5, 0, 0]
    plain = torch.tensor([-1.0, -9.0, -11.0])
    for alpha, summed in ((1.0, plain), (0.0, None)):
        pairs = pair_logps(logps.detach(), batch.pairs, batch.num_tokens, alpha)
        if summed is not None:
            assert torch.equal(
                pairs.chosen, pair_logps(summed, batch.pairs, batch.num_tokens).chosen.double()
            )
        else:
            assert pairs.chosen.tolist() == [-2, -1, -5]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_without_groups_has_no_pairs_with_or_without_alpha(layout: Layout) -> None:
    batch = tree_batch([], layout)
    assert len(pair_logps(torch.zeros(len(batch.targets)), batch.pairs, batch.num_tokens, 0.5).chosen) == 0
    assert len(pair_logps(torch.zeros(1), batch.pairs, batch.num_tokens).chosen) == 0
