"""Best of n and the limit: against enumeration, closed forms and known optima."""

import math
from itertools import combinations

import numpy as np
import pytest

from dpo.evaluate.asked import Asked
from dpo.evaluate.best_of import (
    ReferenceSamples,
    best_of_kl,
    best_of_kl_bound,
    best_of_summary,
    expected_best,
    score_limit,
    values_of_n,
)
from dpo.evaluate.scoring import VaderScorer

SCORES = np.array([[0.0, 3.0, 1.0, 1.0, -2.0], [5.0, 4.0, 4.0, 0.0, 2.0]])
TEXTS = [["bad bad day", "a good day", "a day", "great fun"], ["a day", "a day", "hate", "no"]]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_expected_best_is_the_mean_over_all_draws_of_n(n: int) -> None:
    by_hand = [np.mean([max(draw) for draw in combinations(row, n)]) for row in SCORES]
    assert expected_best(SCORES, n) == pytest.approx(by_hand)


def test_without_ties_the_kl_of_best_of_n_is_the_closed_form() -> None:
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


def test_best_of_n_is_below_the_limit_and_close_to_it() -> None:
    scores = np.random.default_rng(1).normal(size=(1000, 64))
    limit = score_limit(scores)
    for n in (2, 4):
        most = np.interp(best_of_kl_bound(n), limit.kl, [score.mean for score in limit.score])
        assert 0.9 * most < expected_best(scores, n).mean() <= most


def test_few_samples_stop_at_a_smaller_kl_and_are_unbiased_below_it() -> None:
    # r ~ N(0, 1): the optimum at KL k is sqrt(2 k).
    few = score_limit(np.random.default_rng(2).normal(size=(3000, 16)))
    many = score_limit(np.random.default_rng(3).normal(size=(3000, 256)))
    assert few.kl[-1] < many.kl[-1]
    for limit in (few, many):
        for kl, score in list(zip(limit.kl, limit.score, strict=True))[5::7]:
            assert score.mean == pytest.approx(math.sqrt(2 * kl), rel=0.04)


def test_equal_scores_have_a_limit_at_kl_0_only() -> None:
    limit = score_limit(np.ones((3, 8)))
    assert limit.kl.tolist() == [0.0]
    assert limit.score[0].mean == 1.0


def reference_samples() -> ReferenceSamples:
    scores = np.asarray([VaderScorer().score([*map(Asked, texts)], texts) for texts in TEXTS])
    return ReferenceSamples(texts=TEXTS, scores=scores, tokens=np.asarray([[3, 3, 2, 2], [2, 2, 1, 1]]))


def test_the_best_of_two_by_hand() -> None:
    assert reference_samples().best_of(2).tolist() == [1, 0]
    found = best_of_summary(reference_samples(), 2, [-3.0, -5.0], VaderScorer())
    first, second = np.sort(reference_samples().scores, axis=1)
    # Of the 6 pairs of 4 samples the largest is best in 3, the next in 2, the third in 1.
    assert found["score/policy"] == pytest.approx(
        np.mean([(3 * s[3] + 2 * s[2] + s[1]) / 6 for s in (first, second)])
    )
    assert found["positive_share/policy"] == pytest.approx((5 / 6 + 0) / 2)
    assert found["positive_share/reference"] == pytest.approx(2 / 8)
    assert found["perplexity/policy_samples"] == pytest.approx(math.exp(8 / 5))  # picks of 3 and 2 tokens
    assert found["distinct_2/policy"] == 1.0  # "a good", "good day"; "a day"
    # "a good day" loses to "great fun", "a day" wins over "no".
    assert found["win_rate"] == 0.5
    assert found["kl/bound"] == pytest.approx(math.log(2) - 0.5)
    assert 0 < found["kl/sequence"] < found["kl/bound"]


def test_n_goes_up_to_a_quarter_of_the_samples() -> None:
    assert values_of_n(8) == [1, 2]
    assert values_of_n(64) == [1, 2, 4, 8, 16]
