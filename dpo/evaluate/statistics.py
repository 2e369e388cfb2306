"""Statistics of samples and pairs: intervals by prompt, win rate, distinct and repeated n-grams.

Values of one prompt (its samples, its pairs) are not independent: whole prompts are resampled, as clusters.
Every interval comes from sums and counts by cluster, never from means of means. Shares have Wilson's
interval: a bootstrap of values that are all 1 knows no doubt, whether they are 6 or 6,000.
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Interval(NamedTuple):
    """An estimate and the interval around it."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, summary: Mapping[str, float], name: str) -> "Interval":
        """The interval of a metric of summary.json: the inverse of `under`."""
        return cls(summary[name], summary[f"{name}/low"], summary[f"{name}/high"])

    def under(self, name: str) -> dict[str, float]:
        """The keys of summary.json: `name`, `name/low` and `name/high`."""
        return {name: self.mean, f"{name}/low": self.low, f"{name}/high": self.high}


def mean_interval(
    values: npt.ArrayLike,
    clusters: npt.ArrayLike,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean of all values, and its percentile bootstrap interval over resampled clusters.

    Args:
        values: (N,) numbers.
        clusters: (N,) integers or names: which prompt a value belongs to.
        level: Nominal coverage, in (0, 1). With few clusters the interval covers less.
        num_resamples: Bootstrap resamples.
        seed: Seed of the resampling: equal input gives equal intervals.

    Raises:
        ValueError: No values, or lengths that differ.
    """
    ones = np.ones(len(np.asarray(values)))
    return ratio_interval(values, ones, clusters, level=level, num_resamples=num_resamples, seed=seed)


def ratio_interval(
    numerators: npt.ArrayLike,
    denominators: npt.ArrayLike,
    clusters: npt.ArrayLike,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """sum(numerators) / sum(denominators), such as nats per token, and its interval over resampled clusters.

    Args:
        numerators: (N,) numbers.
        denominators: (N,) numbers above 0.
        clusters: (N,) integers or names: which prompt a value belongs to.
        level: As in `mean_interval`.
        num_resamples: As in `mean_interval`.
        seed: As in `mean_interval`.

    Raises:
        ValueError: No values, or lengths that differ.
    """
    numerators, denominators = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    _, members = np.unique(np.asarray(clusters), return_inverse=True)
    if not 0 < len(numerators) == len(denominators) == len(members):
        raise ValueError(
            f"{len(numerators)} numerators, {len(denominators)} denominators, {len(members)} clusters; "
            "expected equal numbers, at least 1"
        )
    sums = np.bincount(members, weights=numerators)  # (C,)
    counts = np.bincount(members, weights=denominators)  # (C,)
    num_clusters = len(sums)
    uniform = np.full(num_clusters, 1 / num_clusters)
    drawn = np.random.default_rng(seed).multinomial(num_clusters, uniform, size=num_resamples)  # (R, C)
    resampled = (drawn @ sums) / (drawn @ counts)  # (R,)
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def win_rate(
    policy_scores: npt.ArrayLike, reference_scores: npt.ArrayLike, clusters: npt.ArrayLike
) -> Interval:
    """How often the policy's sample scores above the reference's on the same prompt and seed.

    A tie counts half.

    Args:
        policy_scores: (N,) scores.
        reference_scores: (N,) scores of the reference's samples.
        clusters: (N,) as in `share_by_cluster`.
    """
    difference = np.asarray(policy_scores, np.float64) - np.asarray(reference_scores, np.float64)
    return share_by_cluster((np.sign(difference) + 1) / 2, clusters)


def distinct_n(sequences: Iterable[Sequence[Hashable]], n: int) -> float:
    """Distinct n-grams over all n-grams of all texts, in (0, 1]: near 0 for a model that repeats itself.

    Args:
        sequences: Texts as words or token ids. Those with fewer than n have no n-gram.
        n: Length of an n-gram, at least 1.

    Returns:
        The share, or 0 if no text has n words.
    """
    seen: set[tuple[Hashable, ...]] = set()
    total = 0
    for sequence in sequences:
        grams = list(zip(*(sequence[start:] for start in range(n)), strict=False))
        seen.update(grams)
        total += len(grams)
    return len(seen) / total if total else 0.0


def repetition(sequences: Iterable[Sequence[Hashable]], n: int) -> float:
    """Share of n-grams that occur earlier in the same text, in [0, 1): near 1 for a text that loops.

    `distinct_n` compares texts with each other; this looks within each.

    Args:
        sequences: Texts as words or token ids. Those with fewer than n have no n-gram.
        n: Length of an n-gram, at least 1.

    Returns:
        The share over the n-grams of all texts, or 0 if no text has n words.
    """
    repeated = total = 0
    for sequence in sequences:
        grams = list(zip(*(sequence[start:] for start in range(n)), strict=False))
        repeated += len(grams) - len(set(grams))
        total += len(grams)
    return repeated / total if total else 0.0


NORMAL = 1.959964
"""Standard errors on either side of a 95 % interval."""


def mean_by_cluster(values: npt.ArrayLike, clusters: npt.ArrayLike) -> Interval:
    """The mean and its 95 % interval from the variance between clusters: for millions of values.

    It agrees with `mean_interval` where there are many clusters, and takes O(N) memory instead of a resample
    of every cluster.

    Args:
        values: (N,) numbers, at least one.
        clusters: (N,) integers from 0: which prompt a value belongs to.
    """
    mean, error = _mean_and_error(values, clusters)
    return Interval(mean, mean - NORMAL * error, mean + NORMAL * error)


def share_by_cluster(holds: npt.ArrayLike, clusters: npt.ArrayLike) -> Interval:
    """A share and its 95 % Wilson interval: within [0, 1], and not empty at 0 and 1.

    N is replaced by the number of independent values with the same variance (Kish's effective sample size).

    Args:
        holds: (N,) bool, or numbers from 0 to 1 such as 0.5 for a tie, at least one.
        clusters: (N,) integers from 0: which prompt a value belongs to.
    """
    share, error = _mean_and_error(holds, clusters)
    spread = share * (1 - share)
    independent = float(
        (np.bincount(np.asarray(clusters)) > 0).sum()
    )  # where all are equal: a value a cluster
    number = spread / error**2 if error > 0 and spread > 0 else independent
    square = NORMAL**2 / number
    centre = (share + square / 2) / (1 + square)
    half = np.sqrt(square * (spread + square / 4)) / (1 + square)
    return Interval(share, float(centre - half), float(centre + half))


def _mean_and_error(values: npt.ArrayLike, clusters: npt.ArrayLike) -> tuple[float, float]:
    """The mean and its standard error, in which the values of a cluster move together."""
    numbers, members = np.asarray(values, np.float64), np.asarray(clusters)
    mean = float(numbers.mean())
    sums = np.bincount(members, weights=numbers - mean)
    return mean, float(np.sqrt((sums**2).sum()) / len(numbers))
