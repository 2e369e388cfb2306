"""What the reference's own samples say of every policy: the best of n of them, and the score that nothing
exceeds at a given KL.

Pure functions of an array of scores, (P, M): M independent continuations by the reference, at temperature 1,
of each of P prompts.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo.evaluate.statistics import Interval

Float64s = npt.NDArray[np.float64]

FEWEST_EFFECTIVE = 8
"""Effective samples a prompt, on average, down to which a tilted distribution is estimated."""
_RESAMPLES = 2000


def expected_best(values: npt.ArrayLike, n: int) -> Float64s:
    """(P,) expected largest of n of a prompt's M values, drawn without replacement: unbiased for n samples.

    The k-th smallest of M is the largest of n with probability C(k - 1, n - 1) / C(M, n).

    Args:
        values: (P, M) numbers.
        n: 1 to M.
    """
    ascending = np.sort(np.asarray(values, np.float64), axis=1)
    num_samples = ascending.shape[1]
    weights = [math.comb(k - 1, n - 1) / math.comb(num_samples, n) for k in range(1, num_samples + 1)]
    return np.asarray(ascending @ np.asarray(weights, np.float64), np.float64)


def best_of_kl_bound(n: int) -> float:
    """KL(best of n || reference) where no two scores are equal, in nats: ln n - (n - 1) / n; else a bound."""
    return math.log(n) - (n - 1) / n


def best_of_kl(scores: npt.ArrayLike, n: int) -> Float64s:
    """(P,) KL(best of n || reference) in nats, equal scores drawn by lot, from the distribution of M samples.

    Best of n takes a score of cumulative share F (up to and with it) and G (below it) with probability
    F^n - G^n, and within it is the reference itself: KL = sum (F^n - G^n) ln [(F^n - G^n) / (F - G)].

    Args:
        scores: (P, M) scores.
        n: At least 1; much less than M, or the M samples are too coarse for it.
    """
    found = []
    for row in np.asarray(scores, np.float64):
        _, counts = np.unique(row, return_counts=True)
        ends = np.concatenate([[0.0], np.cumsum(counts) / len(row)])
        taken, share = np.diff(ends**n), np.diff(ends)
        found.append(float(np.sum(taken[taken > 0] * np.log(taken[taken > 0] / share[taken > 0]))))
    return np.asarray(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The most that a policy's mean score can be, at mean KLs from 0 to where the samples stop telling."""

    kl: Float64s
    """(K,) nats a sequence."""
    score: list[Interval]
    """(K,) bound and its interval, by prompt."""


def score_limit(scores: npt.ArrayLike, *, num_points: int = 41, seed: int = 0) -> Limit:
    """The highest mean score that any policy can have at a given mean KL to the reference.

    For every strength s > 0 and every policy p, E_p[r] <= (KL(p || ref) + ln E_ref[exp(s r)]) / s, with
    equality for p = ref exp(s r) / Z, the optimum of arXiv 2305.18290, Eq. 4, at beta = 1 / s. Averaged over
    prompts and taken at the best s this is the frontier that training approaches. ln E_ref[exp(s r)] comes
    from the M samples, corrected for its bias (jackknife).

    Args:
        scores: (P, M) scores, M at least 2.
        num_points: K, KLs at equal distances from 0 on.
        seed: Of the bootstrap over prompts.

    Returns:
        The bound up to the KL at which a prompt's M samples are worth `FEWEST_EFFECTIVE` of the tilted
        distribution: beyond it they say nothing. Only KL 0 where scores never differ.
    """
    values = np.asarray(scores, np.float64)
    means = values.mean(axis=1)
    spread = float(values.std(axis=1).mean())
    if spread == 0.0:
        return Limit(kl=np.zeros(1), score=[_interval(means, means[None, :].mean(axis=1), seed)])
    strengths = np.geomspace(1e-3, 50, 160) / spread
    tilted = [_log_mean_exp(values, strength) for strength in strengths]
    effective = np.asarray([part[2] for part in tilted])
    known = effective >= min(FEWEST_EFFECTIVE, values.shape[1] / 2)
    strengths, kept = strengths[known], [part for part, told in zip(tilted, known, strict=True) if told]
    logs = np.stack([part[0] for part in kept], axis=1)  # (P, S) ln E_ref[exp(s r)]
    farthest = float(strengths[-1] * kept[-1][1].mean() - logs[:, -1].mean())
    kl = np.linspace(0.0, max(farthest, 0.0), num_points)

    def bound(mean_logs: Float64s) -> Float64s:
        """(..., S) -> (..., K); at KL 0 it is the reference's own mean, which small strengths approach."""
        return np.stack([((point + mean_logs) / strengths).min(axis=-1) for point in kl], axis=-1)

    draws = np.random.default_rng(seed).multinomial(
        len(values), np.full(len(values), 1 / len(values)), _RESAMPLES
    )
    low, high = np.quantile(bound(draws @ logs / len(values)), [0.025, 0.975], axis=0)
    middle = bound(logs.mean(axis=0))
    return Limit(kl=kl, score=[Interval(*map(float, ends)) for ends in zip(middle, low, high, strict=True)])


def _log_mean_exp(values: Float64s, strength: float) -> tuple[Float64s, Float64s, float]:
    """Of exp(strength * values), (P, M): ln of its mean without bias (P,), tilted mean (P,), effective M."""
    num_samples = values.shape[1]
    top = values.max(axis=1, keepdims=True)
    weights = np.exp(strength * (values - top))
    sums = weights.sum(axis=1, keepdims=True)
    plain = np.log(sums[:, 0] / num_samples)
    left_out = np.log(np.maximum(sums - weights, np.finfo(np.float64).tiny) / (num_samples - 1))
    jackknife = num_samples * plain - (num_samples - 1) * left_out.mean(axis=1)
    effective = sums[:, 0] ** 2 / (weights**2).sum(axis=1)
    tilted = (weights * values).sum(axis=1) / sums[:, 0]
    return jackknife + strength * top[:, 0], tilted, float(effective.mean())


def _interval(values: Float64s, middle: Float64s, seed: int) -> Interval:
    draws = np.random.default_rng(seed).multinomial(
        len(values), np.full(len(values), 1 / len(values)), _RESAMPLES
    )
    low, high = np.quantile(draws @ values / len(values), [0.025, 0.975])
    return Interval(float(middle[0]), float(low), float(high))
