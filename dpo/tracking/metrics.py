"""Metrics are sums and counts over real samples, added over all ranks in one collective (law 7).

A mean of per-rank means appears nowhere; only `reduce` divides.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo import distributed


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation during training found."""

    values: dict[str, float]
    """Held-out means, under the names that the README lists."""
    counts: dict[str, float] = field(default_factory=dict)
    """How much they are over, which does not change during a run, under the names of summary.json."""
    margins: npt.NDArray[np.float64] | None = None
    """(P,) reward margin of every held-out pair."""
    samples: str | None = None
    """Continuations of a few held-out prompts by the current policy, a Markdown table."""


class MetricSums:
    """Named sums of this rank: some with a count, of which the mean is wanted, and plain totals."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._totals: dict[str, float] = {}
        self._differences: dict[str, tuple[str, str]] = {}
        self._waiting: list[tuple[list[str], Tensor, float | None]] = []

    def add(self, name: str, total: float, count: float) -> None:
        """Adds the sum of `count` values."""
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def add_values(self, values: Mapping[str, Tensor], count: float) -> None:
        """Adds sums of `count` values each, without waiting for the device: `reduce` reads them.

        Args:
            values: Scalars on one device, without gradient.
            count: Number of values in each sum, or the sum of their weights.
        """
        self._wait_for(values, count)

    def add_totals(self, values: Mapping[str, Tensor]) -> None:
        """Adds to sums that stay sums, such as those that a loss needs of the whole step; as `add_values`."""
        if values:
            self._wait_for(values, None)

    def use_difference(self, name: str, first: str, second: str) -> None:
        """A mean without any value is the difference of two others, whose values nobody paired."""
        self._differences[name] = (first, second)

    def reduce(self, **totals: float) -> tuple[dict[str, float], dict[str, float]]:
        """Means and totals over all ranks, equal on all of them.

        Every rank must call it with the same names.

        Args:
            totals: More totals of this rank.
        """
        for names, sums, count in self._waiting:
            for name, value in zip(names, sums.tolist(), strict=True):
                if count is None:
                    self._totals[name] = self._totals.get(name, 0.0) + value
                else:
                    self.add(name, value, count)
        self._waiting.clear()
        own = self._totals | totals
        means, plain = sorted(self._sums), sorted(own)
        columns = [
            [self._sums[name] for name in means],
            [self._counts[name] for name in means],
            [own[name] for name in plain],
        ]
        packed = distributed.sum_over_ranks(np.array([value for column in columns for value in column]))
        total, counts, plain_sums = np.split(packed, [len(means), 2 * len(means)])
        found = {
            name: float(value / count) if count else float("nan")
            for name, value, count in zip(means, total, counts, strict=True)
        }
        for name, (first, second) in self._differences.items():
            if math.isnan(found[name]):
                found[name] = found[first] - found[second]
        return found, dict(zip(plain, plain_sums.tolist(), strict=True))

    def means(self) -> dict[str, float]:
        """The means of `reduce`, for sums without totals."""
        return self.reduce()[0]

    def _wait_for(self, values: Mapping[str, Tensor], count: float | None) -> None:
        stacked = torch.stack([value.double() for value in values.values()])
        self._waiting.append((list(values), stacked, count))
