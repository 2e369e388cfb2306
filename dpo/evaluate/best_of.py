"""What samples of the reference alone say: best of n, and the highest score possible at a given KL.

Pure functions of M independent continuations by the reference, at temperature 1, of each of P prompts. The
scores are an array (P, M). The summaries have the names of summary.json, so that they can be drawn beside
policies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo.evaluate.scoring import Scorer
from dpo.evaluate.statistics import Interval, distinct_n, mean_interval, ratio_interval, win_rate

Float64s = npt.NDArray[np.float64]

SAMPLES_PER_N = 4
"""Best of n is estimated only from at least this many times n samples."""
FEWEST_EFFECTIVE = 8
"""The limit is given up to the KL at which a prompt's samples are worth this many of the tilted distribution,
on average over prompts."""
_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSamples:
    """M continuations of each of P prompts by the reference."""

    texts: list[list[str]]
    """P lists of M texts."""
    scores: Float64s
    """(P, M)."""
    tokens: npt.NDArray[np.int64]
    """(P, M) tokens that were drawn, EOS included."""

    def best_of(self, n: int) -> npt.NDArray[np.int64]:
        """(P,) index of the best of each prompt's first n samples."""
        return np.asarray(self.scores[:, :n].argmax(axis=1), np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """The highest mean score that a policy can have, for mean KLs from 0 to where the samples are too few."""

    kl: Float64s
    """(K,) nats per sequence."""
    score: list[Interval]
    """(K,) bound and its interval, bootstrapped by prompt."""


def values_of_n(num_samples: int) -> list[int]:
    """The n of best of n: 1, 2, 4, ... as far as `num_samples` per prompt suffice."""
    return [2**power for power in range(num_samples.bit_length()) if 2**power * SAMPLES_PER_N <= num_samples]


def best_of_summary(
    samples: ReferenceSamples, n: int, logps: Sequence[float], scorer: Scorer
) -> dict[str, float]:
    """The metrics of summary.json for the policy that returns the best of n samples of the reference.

    Means are over all draws of n from the M samples. What needs a text uses the best of the first n, and the
    win rate compares it with the last sample.

    Args:
        samples: The samples.
        n: At most M / 2.
        logps: (P,) log-probs in nats of the texts that `samples.best_of(n)` picks.
        scorer: Decides which scores are positive.

    Returns:
        With intervals, as for an evaluation. `kl/bound` is what the KL would be if no two scores were equal.
    """
    prompts, picked = np.arange(len(samples.scores)), samples.best_of(n)
    positive = np.vectorize(scorer.is_positive, otypes=[np.float64])(samples.scores)
    words = [texts[pick].split() for texts, pick in zip(samples.texts, picked.tolist(), strict=True)]
    nats_per_token = ratio_interval(-np.asarray(logps), samples.tokens[prompts, picked], prompts)
    found = {
        "kl/bound": best_of_kl_bound(n),
        "distinct_2/policy": distinct_n(words, 2),
        **Interval(*np.exp(nats_per_token).tolist()).under("perplexity/policy_samples"),
        **mean_interval(best_of_kl(samples.scores, n), prompts).under("kl/sequence"),
        **win_rate(samples.scores[prompts, picked], samples.scores[:, -1], prompts).under("win_rate"),
    }
    for name, values in {"score": samples.scores, "positive_share": positive}.items():
        found |= mean_interval(values.mean(axis=1), prompts).under(f"{name}/reference")
        found |= mean_interval(expected_best(values, n), prompts).under(f"{name}/policy")
    return found


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
    """Ln n - (n - 1) / n: KL(best of n || reference) in nats if no two scores are equal, else a bound."""
    return math.log(n) - (n - 1) / n


def best_of_kl(scores: npt.ArrayLike, n: int) -> Float64s:
    """(P,) KL(best of n || reference) in nats, from the distribution of M samples; ties are broken at random.

    Let F be the share of samples with at most a given score, and G the share below it. Best of n has this
    score with probability F^n - G^n, and given the score it is distributed as the reference:
    KL = sum over scores of (F^n - G^n) ln [(F^n - G^n) / (F - G)].

    Args:
        scores: (P, M) scores.
        n: At least 1, and much less than M: otherwise the M samples are too coarse.
    """
    found = []
    for row in np.asarray(scores, np.float64):
        _, counts = np.unique(row, return_counts=True)
        ends = np.concatenate([[0.0], np.cumsum(counts) / len(row)])
        taken, share = np.diff(ends**n), np.diff(ends)
        found.append(float(np.sum(taken[taken > 0] * np.log(taken[taken > 0] / share[taken > 0]))))
    return np.asarray(found)


def score_limit(scores: npt.ArrayLike, *, num_points: int = 41, seed: int = 0) -> Limit:
    """The highest mean score that any policy can have at a given mean KL to the reference.

    For every strength s > 0 and every policy p, E_p[r] <= (KL(p || ref) + ln E_ref[exp(s r)]) / s, with
    equality for p = ref exp(s r) / Z, the optimum of arXiv 2305.18290, Eq. 4, at beta = 1 / s. Averaged over
    prompts and minimised over s this is the frontier that training approaches. ln E_ref[exp(s r)] is
    estimated from the M samples, with a jackknife correction of its bias.

    Args:
        scores: (P, M) scores, M at least 2.
        num_points: K, the number of KLs, at equal distances from 0 on.
        seed: Seed of the bootstrap over prompts.

    Returns:
        The bound up to the KL at which a prompt's M samples are worth `FEWEST_EFFECTIVE` of the tilted
        distribution: they do not determine it beyond. Only KL 0 if the scores never differ.
    """
    values = np.asarray(scores, np.float64)
    draws = _bootstrap(len(values), seed)
    spread = float(values.std(axis=1).mean())
    if spread == 0.0:
        means = values.mean(axis=1)
        low, high = np.quantile(draws @ means / len(means), [0.025, 0.975])
        return Limit(kl=np.zeros(1), score=[Interval(float(means.mean()), float(low), float(high))])
    strengths = np.geomspace(1e-3, 50, 160) / spread
    tilts = [_tilt(values, strength) for strength in strengths]
    enough = np.asarray([tilt.effective for tilt in tilts]) >= min(FEWEST_EFFECTIVE, values.shape[1] / 2)
    strengths, tilts = (
        strengths[enough],
        [tilt for tilt, is_known in zip(tilts, enough, strict=True) if is_known],
    )
    log_means = np.stack([tilt.log_means for tilt in tilts], axis=1)  # (P, S) ln E_ref[exp(s r)]
    farthest = float(strengths[-1] * tilts[-1].means.mean() - log_means[:, -1].mean())
    kl = np.linspace(0.0, max(farthest, 0.0), num_points)

    def bound(mean_logs: Float64s) -> Float64s:
        """(..., S) -> (..., K); at KL 0 it is the reference's own mean, which small strengths approach."""
        return np.stack([((point + mean_logs) / strengths).min(axis=-1) for point in kl], axis=-1)

    low, high = np.quantile(bound(draws @ log_means / len(values)), [0.025, 0.975], axis=0)
    middle = bound(log_means.mean(axis=0))
    return Limit(kl=kl, score=[Interval(*map(float, ends)) for ends in zip(middle, low, high, strict=True)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tilt:
    """The reference tilted by exp(s r), for one strength s."""

    log_means: Float64s
    """(P,) ln E_ref[exp(s r)], corrected for bias."""
    means: Float64s
    """(P,) mean score of the tilted distribution."""
    effective: float
    """Samples of the tilted distribution that a prompt's M samples are worth, on average."""


def _tilt(values: Float64s, strength: float) -> _Tilt:
    """Of (P, M) scores."""
    num_samples = values.shape[1]
    top = values.max(axis=1, keepdims=True)
    weights = np.exp(strength * (values - top))
    sums = weights.sum(axis=1, keepdims=True)
    plain = np.log(sums[:, 0] / num_samples)
    left_out = np.log(np.maximum(sums - weights, np.finfo(np.float64).tiny) / (num_samples - 1))
    jackknife = num_samples * plain - (num_samples - 1) * left_out.mean(axis=1)
    return _Tilt(
        log_means=jackknife + strength * top[:, 0],
        means=(weights * values).sum(axis=1) / sums[:, 0],
        effective=float((sums[:, 0] ** 2 / (weights**2).sum(axis=1)).mean()),
    )


def _bootstrap(num_prompts: int, seed: int) -> npt.NDArray[np.int64]:
    """(R, P) how often each prompt is in each resample."""
    uniform = np.full(num_prompts, 1 / num_prompts)
    return np.random.default_rng(seed).multinomial(num_prompts, uniform, _RESAMPLES)
