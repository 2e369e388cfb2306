import math
from itertools import combinations

import numpy as np
import pytest

from dpo.evaluate.best_of import best_of_kl, best_of_kl_bound, expected_best, score_limit

SCORES = np.array([[0.0, 3.0, 1.0, 1.0, -2.0], [5.0, 4.0, 4.0, 0.0, 2.0]])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_expected_best_is_the_mean_over_all_draws_of_n(n: int) -> None:
    by_hand = [np.mean([max(draw) for draw in combinations(row, n)]) for row in SCORES]
    assert expected_best(SCORES, n) == pytest.approx(by_hand)


def test_without_ties_the_kl_of_best_of_n_is_the_known_one() -> None:
    scores = np.random.default_rng(0).normal(size=(1, 4000))
    for n in (1, 2, 4, 16):
        assert best_of_kl(scores, n)[0] == pytest.approx(best_of_kl_bound(n), abs=0.01)
    assert best_of_kl_bound(4) == pytest.approx(math.log(4) - 0.75)


def test_with_two_scores_the_kl_of_best_of_n_is_that_of_two_outcomes() -> None:
    # One of four samples is good: the best of 2 is good with probability 1 - (3/4)^2 = 7/16.
    expected = 7 / 16 * math.log(7 / 4) + 9 / 16 * math.log(3 / 4)
    assert best_of_kl([[0.0, 1.0, 0.0, 0.0]], 2)[0] == pytest.approx(expected)
    assert best_of_kl([[1.0, 1.0, 1.0]], 4)[0] == 0.0


def test_the_limit_is_the_optimum_over_all_policies_of_a_known_reference() -> None:
    # A fair coin between 0 and 1: a policy that says 1 with probability q has the score q, and this KL.
    scores = np.random.default_rng(0).integers(0, 2, size=(4000, 64)).astype(np.float64)
    limit = score_limit(scores)
    assert len(limit.kl) == 41
    assert limit.score[0].mean == pytest.approx(0.5, abs=0.02)
    for kl, score in list(zip(limit.kl, limit.score, strict=True))[4::6]:
        q = np.linspace(0.5, 1 - 1e-9, 100_001)
        best = q[np.searchsorted(np.log(2) + q * np.log(q) + (1 - q) * np.log(1 - q), kl)]
        assert score.mean == pytest.approx(best, abs=0.004)
        assert score.low <= score.mean <= score.high


def test_best_of_n_lies_under_the_limit_and_close_to_it() -> None:
    scores = np.random.default_rng(1).normal(size=(1000, 64))
    limit = score_limit(scores)
    for n in (2, 4):
        most = np.interp(best_of_kl_bound(n), limit.kl, [score.mean for score in limit.score])
        assert 0.9 * most < expected_best(scores, n).mean() <= most


def test_few_samples_say_nothing_of_large_kls_and_are_not_biased_for_small_ones() -> None:
    # r ~ N(0, 1): the optimum at KL k is sqrt(2 k).
    few = score_limit(np.random.default_rng(2).normal(size=(3000, 16)))
    many = score_limit(np.random.default_rng(3).normal(size=(3000, 256)))
    assert few.kl[-1] < many.kl[-1]
    for limit in (few, many):
        for kl, score in list(zip(limit.kl, limit.score, strict=True))[5::7]:
            assert score.mean == pytest.approx(math.sqrt(2 * kl), rel=0.04)


def test_scores_that_never_differ_leave_no_room() -> None:
    limit = score_limit(np.ones((3, 8)))
    assert limit.kl.tolist() == [0.0]
    assert limit.score[0].mean == 1.0
