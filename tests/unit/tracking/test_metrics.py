"""Sums and counts are added over ranks before anything is divided."""

import math

import numpy as np
import pytest
import torch

from dpo import distributed
from dpo.tracking.metrics import MetricSums


def test_a_mean_is_the_sum_over_the_count_of_all_additions() -> None:
    sums = MetricSums()
    sums.add("loss", 6.0, 2)  # two values of mean 3
    sums.add("loss", 2.0, 8)  # eight of mean 0.25; the mean of means would be 1.625
    sums.add("accuracy", 1.0, 4)
    assert sums.means() == {"loss": 0.8, "accuracy": 0.25}


def test_a_mean_of_nothing_is_not_a_number() -> None:
    sums = MetricSums()
    sums.add("loss", 0.0, 0)
    assert math.isnan(sums.means()["loss"])
    assert MetricSums().means() == {}


def test_ranks_add_sums_and_counts_before_anything_is_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    other_rank = np.array([5.0, 1.0, 3.0, 1.0])  # sums of a and b, their counts
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: values + other_rank)
    sums = MetricSums()
    sums.add("b", 2.0, 1)  # names are sorted, so that the order of additions may differ between ranks
    sums.add("a", 1.0, 1)
    assert sums.means() == {"a": 6.0 / 4, "b": 3.0 / 2}


def test_totals_stay_sums_and_travel_with_the_means_in_one_collective(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def two_ranks(values: np.ndarray) -> np.ndarray:
        calls.append(len(values))
        return values * 2

    monkeypatch.setattr(distributed, "sum_over_ranks", two_ranks)
    sums = MetricSums()
    sums.add_values({"loss": torch.tensor(6.0)}, 3)
    sums.add_totals({"margin": torch.tensor(1.5)})
    sums.add_totals({"margin": torch.tensor(0.5)})
    sums.add_totals({})
    means, totals = sums.reduce(tokens=10.0)
    assert means == {"loss": 2.0}
    assert totals == {"margin": 4.0, "tokens": 20.0}
    assert calls == [4]  # sum and count of the loss, two totals


def test_a_mean_without_values_may_be_a_difference_of_means() -> None:
    sums = MetricSums()
    sums.add("margins", 0.0, 0)
    sums.add("chosen", 6.0, 3)
    sums.add("rejected", -4.0, 4)
    sums.use_difference("margins", "chosen", "rejected")
    assert sums.means() == {"margins": 3.0, "chosen": 2.0, "rejected": -1.0}
    sums.add("margins", 5.0, 1)
    assert sums.means()["margins"] == 5.0
