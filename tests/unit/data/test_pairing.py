import pytest

from dpo.data.pairing import PAIRING_RULES, pairs_from_scores
from dpo.data.records import Pair


def test_best_vs_rest_pairs_the_best_with_every_lower_one() -> None:
    assert pairs_from_scores([0.1, 0.9, 0.5], "best-vs-rest") == (Pair(1, 0), Pair(1, 2))


def test_best_vs_worst_makes_one_pair() -> None:
    assert pairs_from_scores([0.5, 0.1, 0.9], "best-vs-worst") == (Pair(2, 1),)


def test_mu_2sigma_leaves_an_outlier_alone() -> None:
    scores = [1.0, 0.9, 1.1, 1.0, 0.6, 1.0, 1.2, 1.0, -9.0, 1.0, 0.8, 1.0]  # mean 0.13, deviation 2.76: -5.4
    assert pairs_from_scores(scores, "mu-2sigma") == (Pair(6, 8),)  # -9 is nearest
    assert pairs_from_scores([*scores, -5.0], "mu-2sigma") == (Pair(6, 12),)
    assert pairs_from_scores([1.0, 1.0], "mu-2sigma") == ()


def test_all_pairs_every_completion_with_every_lower_one() -> None:
    assert pairs_from_scores([1.0, 3.0, 2.0], "all") == (Pair(1, 0), Pair(1, 2), Pair(2, 0))


def test_ties_make_no_pair_and_the_first_of_several_best_is_taken() -> None:
    scores = [0.0, 2.0, 2.0, 1.0]
    assert pairs_from_scores(scores, "best-vs-rest") == (Pair(1, 0), Pair(1, 3))
    assert pairs_from_scores(scores, "best-vs-worst") == (Pair(1, 0),)
    assert pairs_from_scores(scores, "all") == (Pair(1, 0), Pair(1, 3), Pair(2, 0), Pair(2, 3), Pair(3, 0))


@pytest.mark.parametrize("rule", PAIRING_RULES)
def test_equal_scores_make_no_pairs(rule: str) -> None:
    assert pairs_from_scores([0.5, 0.5, 0.5], rule) == ()  # type: ignore[arg-type]


def test_a_difference_of_exactly_the_margin_makes_no_pair() -> None:
    # margins 2 and 1 with a minimum of 1: only the first makes a pair
    assert pairs_from_scores([3.0, 1.0, 2.0], "best-vs-rest", 1.0) == (Pair(0, 1),)
