"""The preference loss as an objective: sums over pairs, metrics, and what it keeps from step to step."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dpo.config import Config, LossConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.preference_data import preference_data
from dpo.loss.pairs import LossValues, Pairs
from dpo.loss.preference_loss import FUNCTIONS
from dpo.tracking.metrics import MetricSums
from dpo.train.preference_objective import PreferenceObjective


@pytest.fixture
def data(
    make_config: Callable[..., Config],
    open_data: Callable[[Config], TokenizedDataset],
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., list[dict[str, Any]]],
) -> TokenizedDataset:
    return open_data(make_config(write_jsonl(preference_rows(6))))


def objective_of(data: TokenizedDataset, **loss: Any) -> PreferenceObjective:
    values = np.linspace(-9, -3, len(data.keys))
    return PreferenceObjective(
        data=preference_data(data, values), loss_config=LossConfig(**loss), dtype="float32"
    )


def test_the_loss_is_a_sum_and_the_metrics_are_means_over_pairs(data: TokenizedDataset) -> None:
    objective, sums = objective_of(data), MetricSums()
    groups = np.arange(len(data))
    batch = objective.batch(groups, "packed")
    assert batch.reference is not None
    loss = objective.loss(batch.reference.clone().requires_grad_(), batch, sums)  # policy = reference
    pairs = objective.num_units(groups)
    assert float(loss.detach()) == pytest.approx(pairs * np.log(2))
    means = sums.means()
    assert means["loss"] == pytest.approx(np.log(2))
    assert means["rewards/margins"] == 0


def test_a_batch_without_groups_still_has_a_gradient(data: TokenizedDataset) -> None:
    """A rank that has run out of work takes part in every backward pass."""
    objective, sums = objective_of(data), MetricSums()
    batch = objective.batch(np.zeros(0, dtype=np.int64), "packed")
    logps = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    objective.loss(logps, batch, sums).backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [0.0]


def test_named_sums_are_totals_and_come_back_in_the_next_step(
    data: TokenizedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, float]] = []

    def counting(pairs: Pairs, loss: LossConfig) -> LossValues:
        assert pairs.so_far is not None
        seen.append(dict(pairs.so_far))
        return LossValues(losses=pairs.margins * 0, sums={"pairs": torch.ones_like(pairs.margins).sum()})

    monkeypatch.setitem(FUNCTIONS, "sigmoid", counting)
    objective, sums = objective_of(data), MetricSums()
    for groups in (np.array([0, 1]), np.array([2]), np.zeros(0, dtype=np.int64)):
        batch = objective.batch(groups, "packed")
        objective.loss(torch.zeros(len(batch.num_tokens), dtype=torch.float64), batch, sums)
    means, totals = sums.reduce(real=5.0)
    assert "loss_sum/pairs" not in means
    kept = objective.observe(totals)
    assert kept == {"pairs": float(objective.num_units(np.array([0, 1, 2])))}
    batch = objective.batch(np.array([0]), "packed")
    objective.loss(torch.zeros(len(batch.num_tokens), dtype=torch.float64), batch, MetricSums())
    assert seen == [{}, {}, {}, kept]
    resumed = objective_of(data)
    resumed.restore(kept)
    assert resumed.loss_sums == kept
    twice = resumed.observe(totals)
    assert twice == {"pairs": 2 * kept["pairs"]}
    assert resumed.observe({"loss_sum/pairs": float("nan")}) == twice  # of a step that was skipped
