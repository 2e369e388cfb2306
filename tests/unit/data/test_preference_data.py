"""What a loss reads besides the trees: values per sequence and token, weights, and denominators."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from dpo.data.dataset import TokenizedDataset, map_dataset, write_dataset
from dpo.data.preference_data import preference_data
from dpo.data.records import Pair, TokenizedGroup


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


@pytest.fixture
def data(tmp_path: Path) -> TokenizedDataset:
    groups = [
        TokenizedGroup(prompt=ids(7), completions=(ids(1), ids(2, 2)), pairs=(Pair(0, 1),), margins=(0.5,)),
        TokenizedGroup(
            prompt=ids(8, 8),
            completions=(ids(3, 3, 3), ids(4), ids(5)),
            pairs=(Pair(0, 1), Pair(0, 2), Pair(1, 2)),
            margins=(1.0, 3.0, 2.0),
        ),
    ]
    write_dataset(groups, tmp_path / "data", Counter())
    return map_dataset(tmp_path / "data", "digest")


SUMS = np.array([10.0, 20.0, 30.0, 40.0, 50.0])
TOKENS = np.arange(8, dtype=np.float32)  # 1, 2, 3, 1 and 1 of the five completions


@pytest.mark.parametrize(
    ("groups", "sums", "tokens"),
    [
        ([0], [10, 20], [0, 1, 2]),
        ([1], [30, 40, 50], [3, 4, 5, 6, 7]),
        ([1, 0], [30, 40, 50, 10, 20], [3, 4, 5, 6, 7, 0, 1, 2]),
        ([], [], []),
    ],
)
def test_values_come_with_their_groups_in_any_order(
    data: TokenizedDataset, groups: list[int], sums: list[float], tokens: list[float]
) -> None:
    chosen = np.array(groups, dtype=np.int64)
    assert data.values_of(SUMS, chosen).tolist() == sums
    assert data.values_of(TOKENS, chosen).tolist() == tokens
    batch = preference_data(data, SUMS).batch(chosen, "packed")
    assert batch.reference is not None
    assert batch.reference.tolist() == sums


def test_a_mean_is_over_pairs_or_weights_or_groups(data: TokenizedDataset) -> None:
    both = np.array([0, 1])
    plain = preference_data(data, SUMS)
    assert (plain.count(both), plain.count(both[1:])) == (4, 3)
    weighted = preference_data(data, SUMS, by_margin=True)
    assert (weighted.count(both), weighted.count(both[1:])) == (6.5, 6.0)
    assert weighted.batch(both[::-1], "trees").pair_weights.tolist() == [1.0, 3.0, 2.0, 0.5]  # type: ignore[union-attr]
    ranked = preference_data(data, SUMS, over_groups=True)
    assert ranked.count(both) == pytest.approx(2)
    assert ranked.batch(both, "trees").pair_weights.tolist() == [1.0] * 4  # type: ignore[union-attr]
    assert ranked.batch(both, "trees").loss_count == pytest.approx(2)


def test_without_a_reference_there_are_no_values(data: TokenizedDataset) -> None:
    assert preference_data(data, None).batch(np.array([0]), "packed").reference is None


def test_pairs_without_scores_cannot_be_weighted_by_them(tmp_path: Path) -> None:
    group = TokenizedGroup(prompt=ids(7), completions=(ids(1), ids(2)), pairs=(Pair(0, 1),))
    write_dataset([group], tmp_path / "plain", Counter())
    plain = map_dataset(tmp_path / "plain", "digest")
    assert np.isnan(plain.margins).all()
    with pytest.raises(ValueError, match="pairs without scores"):
        preference_data(plain, None, by_margin=True)
