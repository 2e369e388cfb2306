"""Scores -> pairs: which of a prompt's scored completions are preferred to which others.

Used by training and data_prep where data has scores and no pairs. Ties never make a pair.
"""

from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Literal, get_args

from dpo.data.records import Pair

PairingRule = Literal["best-vs-rest", "best-vs-worst", "mu-2sigma", "all"]
DEFAULT_PAIRING: PairingRule = "best-vs-rest"
PAIRING_RULES: tuple[PairingRule, ...] = get_args(PairingRule)


def quantiles(scores: Sequence[float], of_reference: Sequence[float]) -> tuple[float, ...]:
    """The share of the reference's completions that score no more than each completion, in [0, 1].

    Args:
        scores: Of the completions.
        of_reference: Of completions that the reference wrote to the same prompt; at least one.
    """
    return tuple(sum(other <= score for other in of_reference) / len(of_reference) for score in scores)


def pairs_from_scores(
    scores: Sequence[float], rule: PairingRule, min_margin: float = 0.0
) -> tuple[Pair, ...]:
    """The pairs (chosen, rejected) whose scores differ by more than `min_margin`.

    Args:
        scores: One finite score per completion, higher is better; at least one.
        rule: best-vs-rest: the best completion against every other. best-vs-worst: one pair. mu-2sigma: the
            best against the one whose score is nearest to the mean less two standard deviations, which is
            not an outlier as the worst of many may be (arXiv 2502.16825). all: every completion against
            every one with a lower score. Of completions that tie, the first is taken.
        min_margin: At least 0, in units of the score; a difference of exactly this makes no pair.

    Returns:
        The pairs in ascending order of their indices; possibly none.
    """
    indices = range(len(scores))
    best = max(indices, key=scores.__getitem__)
    worst = min(indices, key=scores.__getitem__)
    aim = fmean(scores) - 2 * pstdev(scores)
    low = min(indices, key=lambda index: abs(scores[index] - aim))
    candidates = {
        "best-vs-rest": [(best, other) for other in indices],
        "best-vs-worst": [(best, worst)],
        "mu-2sigma": [(best, low)],
        "all": [(chosen, rejected) for chosen in indices for rejected in indices],
    }[rule]
    return tuple(
        Pair(chosen, rejected)
        for chosen, rejected in candidates
        if scores[chosen] - scores[rejected] > max(min_margin, 0.0)
    )
