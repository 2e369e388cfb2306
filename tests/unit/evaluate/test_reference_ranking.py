"""How the reference ranks pairs: shares, the limit for a suspected flip, and a cache with holes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from groups import ids

from dpo.data.dataset import TokenizedDataset, map_dataset, write_dataset
from dpo.data.records import Pair, TokenizedGroup
from dpo.evaluate.reference_ranking import FAR, reference_ranking

NAN = float("nan")
LENGTHS = ((1, 2), (2, 2), (4, 1), (1, 1), (2, 3))
"""Tokens of chosen and rejected."""


@pytest.fixture
def data(tmp_path: Path) -> TokenizedDataset:
    groups = [
        TokenizedGroup(
            prompt=ids(number),
            completions=(ids(*[1] * chosen), ids(*[2] * rejected)),
            pairs=(Pair(0, 1),),
        )
        for number, (chosen, rejected) in enumerate(LENGTHS)
    ]
    write_dataset(groups, tmp_path / "data", Counter())
    return map_dataset(tmp_path / "data", "digest")


def test_margins_in_total_and_per_token(data: TokenizedDataset) -> None:
    logps = np.array([-1.0, -4, -2, -3, -8, -3, -5, -5, NAN, -3])
    ranking = reference_ranking(data, logps, np.arange(5))
    assert ranking is not None
    assert ranking.known == 4
    np.testing.assert_allclose(ranking.margins, [3, 1, -5, 0, NAN])
    np.testing.assert_allclose(ranking.per_token, [1, 0.5, 1, 0, NAN])  # -8 / 4 is above -3 / 1
    assert ranking.right.mean == 2 / 4
    assert ranking.right_per_token.mean == 3 / 4
    assert ranking.limit == pytest.approx(-FAR * np.std([3, 1, -5, 0]))
    assert ranking.suspects.tolist() == []


def test_a_suspect_is_far_wrong_in_total_and_wrong_per_token(data: TokenizedDataset) -> None:
    rng = np.random.default_rng(0)
    many = np.tile(np.arange(5), 40)
    groups = [data[int(number)] for number in many]
    folder = data.path.parent / "many"
    write_dataset(groups, folder, Counter())
    larger = map_dataset(folder, "digest")
    logps = rng.normal(scale=0.1, size=2 * len(many))
    logps[2 * 3], logps[2 * 8], logps[2 * 2] = -9, -12, -4  # pairs 3, 8 and 2, whose chosen has four tokens
    logps[2 * 2 + 1] = -3
    ranking = reference_ranking(larger, logps, many)
    assert ranking is not None
    assert ranking.suspects.tolist() == [8, 3]  # the worst first; pair 2 is right per token


def test_a_cache_without_any_pair_ranks_nothing(data: TokenizedDataset) -> None:
    logps = np.where(np.arange(10) % 2 == 0, NAN, -1.0)
    assert reference_ranking(data, logps, np.arange(5)) is None
