"""The tensors of a micro-batch, literally."""

import numpy as np
import torch

from dpo.data.batches import RowBatch, group_batch, sequence_batch
from dpo.records import Pair, TokenIds, TokenizedGroup


def ids(*values: int) -> TokenIds:
    return np.array(values, dtype=np.int32)


def two_groups() -> RowBatch:
    first = TokenizedGroup(prompt=ids(7, 8), completions=(ids(1), ids(2, 3)), pairs=(Pair(0, 1),))
    second = TokenizedGroup(
        prompt=ids(9), completions=(ids(4), ids(5, 6), ids(4, 4, 4)), pairs=(Pair(2, 0), Pair(2, 1))
    )
    return group_batch([first, second])


def test_every_completion_is_one_row_after_its_prompt_padded_on_the_right() -> None:
    expected = [[7, 8, 1, 0], [7, 8, 2, 3], [9, 4, 0, 0], [9, 5, 6, 0], [9, 4, 4, 4]]
    assert two_groups().input_ids.tolist() == expected
    assert two_groups().input_ids.dtype == torch.int64


def test_a_position_predicts_where_the_next_token_belongs_to_the_completion() -> None:
    expected = [[0, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]
    assert two_groups().predicts.int().tolist() == expected


def test_targets_stand_in_row_order_with_their_rows() -> None:
    batch = two_groups()
    assert batch.targets.tolist() == [1, 2, 3, 4, 5, 6, 4, 4, 4]
    assert batch.rows.tolist() == [0, 1, 1, 2, 3, 3, 4, 4, 4]
    assert batch.num_tokens.tolist() == [1, 2, 1, 2, 3]
    assert batch.predicts.sum() == len(batch.targets)


def test_pairs_name_rows_of_the_batch_and_padding_is_not_counted() -> None:
    batch = two_groups()
    assert batch.pairs.tolist() == [[0, 1], [4, 2], [4, 3]]
    assert batch.num_real_tokens == 3 + 4 + 2 + 3 + 4


def test_pair_values_are_picked_by_row() -> None:
    picked = two_groups().pair_logps(torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0]))
    assert picked.chosen.tolist() == [-1.0, -5.0, -5.0]
    assert picked.rejected.tolist() == [-2.0, -3.0, -4.0]
    assert picked.chosen_tokens.tolist() == [1, 3, 3]
    assert picked.rejected_tokens.tolist() == [2, 1, 2]


def test_a_batch_without_work_is_a_row_that_predicts_nothing() -> None:
    for batch in (group_batch([]), sequence_batch([])):
        assert batch.input_ids.shape == (1, 2)
        assert not batch.predicts.any()
        assert (len(batch.targets), len(batch.rows), batch.num_real_tokens) == (0, 0, 0)
        assert batch.pairs.shape == (0, 2)
        assert batch.pair_logps(torch.zeros(1)).chosen.shape == (0,)


def test_moving_a_batch_changes_nothing() -> None:
    batch = two_groups()
    moved = batch.to(torch.device("cpu"))
    for name in ("input_ids", "predicts", "targets", "rows", "num_tokens", "pairs"):
        assert torch.equal(getattr(moved, name), getattr(batch, name))
    assert moved.num_real_tokens == batch.num_real_tokens
