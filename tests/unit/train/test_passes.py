"""The cached gradient is the direct one, and losses of the whole step do not depend on its micro-batches."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from unit.train.runs import STEPS, Trained, assert_resumed_alike, changed

from dpo.config import Config, LossConfig
from dpo.data.dataset import TokenizedDataset
from dpo.engine.engine import Engine

LOSSES_TO_CACHE = {
    "dpo": {},
    "tokens": {"ld_alpha": 0.5},
    "ranking": {"type": "plackett_luce"},
    "no reference": {"type": "simpo"},
    "weights of the policy": {"pair_weights": "wpo"},
    "mixture": {"type": ["sigmoid", "ipo"], "weights": [0.8, 0.2], "sft_weight": 0.1},
}


@pytest.mark.parametrize(("name", "budget"), [*((name, 24) for name in LOSSES_TO_CACHE), ("dpo", 100_000)])
def test_a_cached_gradient_is_the_direct_one(
    experiment: Config,
    run: Trained,
    open_data: Callable[[Config], TokenizedDataset],
    name: str,
    budget: int,
) -> None:
    """Also where a budget of 24 tokens cuts every group into single completions."""
    loss = LossConfig(**LOSSES_TO_CACHE[name])
    data = open_data(experiment)
    values = np.full(len(data.keys), -20.0)
    if loss.ld_alpha is not None:
        values = np.full(int(data.completion_tokens.sum()), -2.0)
    config = replace(experiment, loss=loss)
    direct = run(changed(config, "direct", backward="direct"), reference=values)
    cached = run(
        changed(config, "cached", backward="cached", max_tokens_per_micro_batch=budget), reference=values
    )
    for line, other in zip(cached.lines(), direct.lines(), strict=True):
        assert line.keys() == other.keys()
        for key, found in line.items():
            assert found == pytest.approx(other[key], rel=2e-5, abs=2e-6), key


@pytest.mark.parametrize("budget", [24, 100_000])
def test_the_last_piece_of_a_step_is_scored_once(
    experiment: Config, run: Trained, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """So that a step of one piece costs no more than the direct way."""
    passes: list[bool] = []
    plain = Engine.score

    def counted(self: Engine, *arguments: Any, **options: Any) -> Tensor:
        passes.append(torch.is_grad_enabled())
        return plain(self, *arguments, **options)

    monkeypatch.setattr(Engine, "score", counted)
    run(changed(experiment, "counted", backward="cached", max_tokens_per_micro_batch=budget))
    with_gradient = sum(passes)
    assert len(passes) - with_gradient == with_gradient - STEPS
    assert (with_gradient == STEPS) == (budget == 100_000)


def test_a_cached_gradient_is_resumed_bit_for_bit(experiment: Config, run: Trained) -> None:
    options = {"checkpoint_every": 2, "evaluate_every": 1, "backward": "cached"}
    loss = LossConfig(type="aot")
    experiment = replace(experiment, loss=loss)
    whole = run(changed(experiment, "whole", **options), evaluation=float)
    assert_resumed_alike(run, changed(experiment, "killed", **options), whole)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_cached_step_whose_loss_is_not_finite_is_skipped(
    experiment: Config, run: Trained, spoil: Callable[..., None], value: float
) -> None:
    spoil({3}, value)
    trained = run(changed(experiment, "spoiled", backward="cached"))
    assert [line["step"] for line in trained.lines() if "train/skipped_steps" in line] == [3]
    assert all(bool(weight.isfinite().all()) for weight in trained.weights.values())


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_a_loss_of_the_whole_step_does_not_depend_on_micro_batches(
    experiment: Config, run: Trained, name: str
) -> None:
    config = replace(experiment, loss=LossConfig(type=name, beta=0.5))
    small = run(changed(config, "small", max_tokens_per_micro_batch=30, num_epochs=4, max_steps=8))
    large = run(changed(config, "large", max_tokens_per_micro_batch=100_000, num_epochs=4, max_steps=8))
    assert small.curve("train/loss") == pytest.approx(large.curve("train/loss"), rel=1e-5)
    assert small.curve("train/grad_norm") == pytest.approx(large.curve("train/grad_norm"), rel=1e-4)
    assert small.curve("train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert small.curve("train/loss")[-1] < 0.6
