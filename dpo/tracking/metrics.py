"""Metrics are sums and counts over real samples, reduced over ranks (law 7); only `means` divides."""

from collections.abc import Mapping
from dataclasses import dataclass

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
    margins: npt.NDArray[np.float64] | None = None
    """(P,) reward margin of every held-out pair."""
    samples: str | None = None
    """Continuations of a few held-out prompts by the policy as it is, a Markdown table."""


class MetricSums:
    """Named sums with one count a name; adding and reducing keep both, and only `means` divides."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._waiting: list[tuple[list[str], Tensor, float]] = []

    def add_values(self, values: Mapping[str, Tensor], count: float) -> None:
        """Adds sums of `count` values each without waiting for the device: they are read by `means`.

        Args:
            values: Single numbers on one device, without gradient.
            count: Values in each sum, by their weights.
        """
        self._waiting.append(
            (list(values), torch.stack([value.double() for value in values.values()]), count)
        )

    def add(self, name: str, total: float, count: float) -> None:
        """Adds the sum of `count` values."""
        self._sums[name] = self._sums.get(name, 0.0) + total
        self._counts[name] = self._counts.get(name, 0.0) + count

    def means(self) -> dict[str, float]:
        """Means over all ranks, equal on all of them. Every rank must call it with the same names."""
        for waiting, totals, count in self._waiting:
            for name, total in zip(waiting, totals.tolist(), strict=True):
                self.add(name, total, count)
        self._waiting.clear()
        names = sorted(self._sums)
        packed = np.array([[self._sums[name] for name in names], [self._counts[name] for name in names]])
        sums, counts = distributed.sum_over_ranks(packed.ravel()).reshape(2, -1)
        return {
            name: float(s / c) if c else float("nan") for name, s, c in zip(names, sums, counts, strict=True)
        }
