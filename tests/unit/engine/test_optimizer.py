"""Schedules and optimizers by hand."""

import math

import pytest
import torch
from torch import nn

from dpo.config import OptimizationConfig
from dpo.engine.optimizer import learning_rate, make_optimizer


def rates(num_steps: int, **options: object) -> list[float]:
    config = OptimizationConfig(learning_rate=1.0, **options)  # type: ignore[arg-type]
    return [learning_rate(step, num_steps, config) for step in range(1, num_steps + 1)]


def test_the_warm_up_is_linear_and_then_constant() -> None:
    assert rates(40, warmup_steps=4)[:6] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert set(rates(40, warmup_steps=4)[3:]) == {1.0}


def test_the_warm_up_takes_a_tenth_of_a_short_run_at_most() -> None:
    assert rates(20, warmup_steps=150)[:4] == [0.5, 1.0, 1.0, 1.0]
    assert rates(9, warmup_steps=150) == [1.0] * 9


def test_no_warm_up_starts_at_the_peak() -> None:
    assert rates(20, warmup_steps=0) == [1.0] * 20


def test_a_linear_decay_starts_at_the_peak_and_ends_one_step_before_zero() -> None:
    # 10 steps of which 1 warms up: the other 9 go from 1 down in ninths.
    expected = [1.0] + [1 - step / 9 for step in range(9)]
    assert rates(10, schedule="linear", warmup_steps=1) == pytest.approx(expected)


def test_a_cosine_decay_is_half_way_in_the_middle() -> None:
    found = rates(8, schedule="cosine", warmup_steps=0)
    assert found == pytest.approx([(1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)])
    assert found[4] == pytest.approx(0.5)
    assert found == sorted(found, reverse=True)


def test_the_peak_scales_everything() -> None:
    options = OptimizationConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=2)
    one = OptimizationConfig(learning_rate=1.0, schedule="cosine", warmup_steps=2)
    for step in (1, 2, 11, 30):
        assert learning_rate(step, 30, options) == pytest.approx(3e-4 * learning_rate(step, 30, one))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.norm = nn.LayerNorm(2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)


def test_weight_decay_is_of_matrices_only() -> None:
    module = Small()
    optimizer = make_optimizer(module, OptimizationConfig(weight_decay=0.1))
    groups = {group["weight_decay"]: [id(p) for p in group["params"]] for group in optimizer.param_groups}
    assert groups == {
        0.1: [id(module.linear.weight)],
        0.0: [id(module.linear.bias), id(module.norm.weight), id(module.norm.bias)],
    }


def test_adamw_has_the_betas_of_the_configuration() -> None:
    options = OptimizationConfig(adam_betas=(0.8, 0.95), learning_rate=0.5)
    optimizer = make_optimizer(Small(), options)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert all(g["betas"] == (0.8, 0.95) and g["lr"] == 0.5 for g in optimizer.param_groups)


def test_rmsprop_is_the_papers() -> None:
    optimizer = make_optimizer(Small(), OptimizationConfig(optimizer="rmsprop", weight_decay=0.1))
    assert isinstance(optimizer, torch.optim.RMSprop)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    assert all(g["alpha"] == 0.99 for g in optimizer.param_groups)


def test_a_module_without_matrices_has_no_empty_group() -> None:
    assert len(make_optimizer(nn.LayerNorm(2), OptimizationConfig()).param_groups) == 1
