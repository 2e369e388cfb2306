"""Plackett-Luce: products of softmaxes by hand, ties, partial rankings, and several groups in a batch."""

import itertools
import math

import pytest
import torch

from dpo.config import LossConfig
from dpo.loss.pairs import PairLogProbs
from dpo.loss.preference_loss import preference_loss

BETA = 0.5
CONFIG = LossConfig(type="plackett_luce", beta=BETA)


def losses(scores: list[list[float]], pairs: list[tuple[int, int]]) -> list[float]:
    """Losses of the pairs, given the log-ratios of all completions, group after group."""
    values = torch.tensor([value for group in scores for value in group], dtype=torch.float64)
    chosen = torch.tensor([pair[0] for pair in pairs])
    rejected = torch.tensor([pair[1] for pair in pairs])
    ones = torch.ones_like(chosen)

    def of(values: torch.Tensor) -> PairLogProbs:
        return PairLogProbs(
            chosen=values[chosen],
            rejected=values[rejected],
            chosen_tokens=ones,
            rejected_tokens=ones,
            chosen_sequences=chosen,
        )

    found: list[float] = preference_loss(of(values), of(torch.zeros_like(values)), CONFIG).losses.tolist()
    return found


def by_hand(ranked: list[float]) -> float:
    """-log of the product over k of exp(beta h_k) / sum from k on."""
    weights = [math.exp(BETA * h) for h in ranked]
    return -sum(math.log(weights[k] / sum(weights[k:])) for k in range(len(weights)))


def full(number: int, first: int = 0) -> list[tuple[int, int]]:
    return [(first + a, first + b) for a, b in itertools.combinations(range(number), 2)]


@pytest.mark.parametrize("number", [2, 3, 5])
def test_a_full_ranking_is_the_product_of_its_softmaxes(number: int) -> None:
    ranked = [math.sin(3.0 * k) * 4 for k in range(number)]
    assert sum(losses([ranked], full(number))) == pytest.approx(by_hand(ranked), rel=1e-12)


def test_equal_completions_are_as_likely_in_any_of_their_orders() -> None:
    assert sum(losses([[1.0] * 4], full(4))) == pytest.approx(math.log(math.factorial(4)), rel=1e-12)


def test_two_completions_are_dpo() -> None:
    assert losses([[1.0, -0.6]], [(0, 1)]) == pytest.approx([math.log1p(math.exp(-0.8))], rel=1e-12)


def test_best_against_the_rest_is_the_likelihood_that_the_best_comes_first() -> None:
    scores = [2.0, 0.5, -1.0, 0.0]
    weights = [math.exp(BETA * h) for h in scores]
    found = losses([scores], [(0, 1), (0, 2), (0, 3)])
    assert sum(found) == pytest.approx(-math.log(weights[0] / sum(weights)), rel=1e-12)
    assert len(set(found)) == 1


def test_groups_in_one_batch_do_not_mix() -> None:
    first, second = [0.3, -2.0, 1.0], [5.0, -5.0]
    together = losses([first, second], [*full(3), *full(2, first=3)])
    assert together == pytest.approx([*losses([first], full(3)), *losses([second], full(2))], rel=1e-12)
