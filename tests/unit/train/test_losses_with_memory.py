"""Losses that look at the steps before: resumed with what they saw, whatever the micro-batches."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from unit.train.runs import Trained, assert_resumed_alike, changed

from dpo.config import Config, LossConfig
from dpo.loss.pairs import LossValues, Pairs
from dpo.loss.preference_loss import FUNCTIONS


def relative_to_the_mean(pairs: Pairs, loss: LossConfig) -> LossValues:
    """DPO on margins relative to their mean over all steps before."""
    last = pairs.so_far
    mean = last["margins"] / last["pairs"] if last else 0.0
    losses = -torch.nn.functional.logsigmoid(loss.beta * (pairs.margins - mean))
    return LossValues(
        losses=losses, sums={"margins": pairs.margins.sum(), "pairs": torch.ones_like(losses).sum()}
    )


def test_a_loss_may_look_at_the_steps_before_and_is_resumed_with_them(
    experiment: Config, run: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FUNCTIONS, "sigmoid", relative_to_the_mean)
    options = {"checkpoint_every": 2, "evaluate_every": 1}
    whole = run(changed(experiment, "whole", **options), evaluation=float)
    small = run(changed(experiment, "small", max_tokens_per_micro_batch=40, **options), evaluation=float)
    assert small.curve("train/loss") == pytest.approx(whole.curve("train/loss"), rel=1e-5)
    assert not any("loss_sum" in name for line in whole.lines() for name in line)  # no metric of its own
    assert_resumed_alike(run, changed(experiment, "killed", **options), whole)
    plain = run(
        changed(replace(experiment, loss=LossConfig(type="hinge")), "plain", **options), evaluation=float
    )
    assert plain.curve("train/loss") != whole.curve("train/loss")


def test_the_shift_of_bco_is_resumed_and_does_not_depend_on_micro_batches(
    experiment: Config, run: Trained
) -> None:
    experiment = replace(experiment, loss=LossConfig(type="bco_pair", beta=0.5))
    options = {"checkpoint_every": 2, "evaluate_every": 1}
    whole = run(changed(experiment, "whole", **options), evaluation=float)
    small = run(changed(experiment, "small", max_tokens_per_micro_batch=40, **options), evaluation=float)
    assert small.curve("train/loss") == pytest.approx(whole.curve("train/loss"), rel=1e-5)
    assert_resumed_alike(run, changed(experiment, "killed", **options), whole)


def test_a_step_that_is_skipped_does_not_spoil_the_shift_of_bco(
    experiment: Config, run: Trained, spoil: Callable[..., None]
) -> None:
    spoil({2}, math.nan)
    trained = run(changed(replace(experiment, loss=LossConfig(type="bco_pair")), "spoiled"))
    assert [line["step"] for line in trained.lines() if "train/skipped_steps" in line] == [2]
    assert [math.isfinite(line.get("train/loss", math.nan)) for line in trained.lines()][2:4] == [True, True]
