"""f-divergences: f' by hand, what they share, and that nothing overflows."""

import math
from typing import Any

import pytest
import torch

from dpo.config import LossConfig
from dpo.loss.catalog import DIVERGENCE, LOSSES
from dpo.loss.f_divergences import derivative
from dpo.loss.pairs import PairLogProbs
from dpo.loss.preference_loss import preference_loss

OTHERS: dict[str, dict[str, Any]] = {
    "forward_kl": {"f_divergence": "forward_kl"},
    "js": {"f_divergence": "js"},
    "alpha": {"f_divergence": "alpha", "f_alpha": 0.25},
}
ALL = {"reverse_kl": {}, **OTHERS}
WITH_A_DIVERGENCE = [name for name, kind in LOSSES.items() if kind.uses >= DIVERGENCE]


def of(ratio: float, **options: Any) -> float:
    found = derivative(torch.tensor([math.log(ratio)], dtype=torch.float64), LossConfig(**options))
    return found.item()


@pytest.mark.parametrize("ratio", [0.01, 0.5, 1.0, 3.0])
def test_by_hand(ratio: float) -> None:
    close = pytest.approx
    assert of(ratio) == close(math.log(ratio), rel=1e-12, abs=1e-15)
    assert of(ratio, **OTHERS["forward_kl"]) == close(1 - 1 / ratio, rel=1e-12, abs=1e-12)
    assert of(ratio, **OTHERS["js"]) == close(math.log(2 * ratio / (1 + ratio)), rel=1e-12, abs=1e-15)
    assert of(ratio, **OTHERS["alpha"]) == close((1 - ratio**-0.25) / 0.25, rel=1e-12, abs=1e-12)


def test_alpha_lies_between_the_two_kls() -> None:
    near_reverse, near_forward = (of(0.3, f_divergence="alpha", f_alpha=alpha) for alpha in (1e-7, 1 - 1e-7))
    assert near_reverse == pytest.approx(of(0.3), rel=1e-6)
    assert near_forward == pytest.approx(of(0.3, f_divergence="forward_kl"), rel=1e-6)


def test_the_default_is_the_difference_of_log_ratios_bit_for_bit() -> None:
    ratios = torch.linspace(-7, 5, 13, dtype=torch.float64)
    assert torch.equal(derivative(ratios, LossConfig()), ratios)


@pytest.mark.parametrize("name", sorted(ALL))
def test_all_increase_so_that_rewards_rank_alike(name: str) -> None:
    ratios = torch.linspace(-200, 200, 801, dtype=torch.float64)
    slopes = derivative(ratios, LossConfig(**ALL[name])).diff()
    assert (slopes[:400] > 0).all()
    assert (slopes >= 0).all()


@pytest.mark.parametrize("name", sorted(OTHERS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ratio", [-5e3, -60.0, 60.0, 5e3])
def test_far_from_the_reference_value_and_gradient_are_finite(
    name: str, dtype: torch.dtype, ratio: float
) -> None:
    ratios = torch.tensor([ratio], dtype=dtype, requires_grad=True)
    value = derivative(ratios, LossConfig(**OTHERS[name]))
    (slope,) = torch.autograd.grad(value.sum(), ratios)
    assert value.isfinite().all()
    assert slope.isfinite().all()
    assert ratio > 0 or slope.item() > 0.4  # where the policy has left the data, it is still drawn back


def logps(values: torch.Tensor) -> PairLogProbs:
    half = len(values) // 2
    tokens = torch.full((half,), 4)
    return PairLogProbs(
        chosen=values[:half], rejected=values[half:], chosen_tokens=tokens, rejected_tokens=tokens
    )


@pytest.mark.parametrize("divergence", sorted(OTHERS))
@pytest.mark.parametrize("name", WITH_A_DIVERGENCE)
def test_every_loss_of_the_margin_takes_it(name: str, divergence: str) -> None:
    """The loss of other log-ratios, equal to f': so every test of the loss holds for it."""
    smoothing = 0.25 if "label_smoothing" in LOSSES[name].uses else 0.0
    plain = LossConfig(type=name, beta=0.5, label_smoothing=smoothing)
    other = LossConfig(type=name, beta=0.5, label_smoothing=smoothing, **OTHERS[divergence])
    ratios = torch.tensor([1.0, -0.3, 0.4, -2.0], dtype=torch.float64)
    nothing = logps(torch.zeros(4, dtype=torch.float64))
    found = preference_loss(logps(ratios), nothing, other)
    expected = preference_loss(logps(derivative(ratios, other)), nothing, plain)
    assert found.losses.tolist() == pytest.approx(expected.losses.tolist(), rel=1e-12)
    assert found.chosen_rewards.tolist() == [0.5, -0.15]  # beta log(pi / ref), with every divergence
    start = ratios.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: preference_loss(logps(v), nothing, other).losses, start)


def test_f_dpo_with_the_forward_kl_by_hand() -> None:
    # h_w = ln 2, h_l = -ln 4: f' = 1/2 and -3; beta 0.5: -log sigma(1.75)
    policy = logps(torch.tensor([math.log(2), -math.log(4)], dtype=torch.float64))
    nothing = logps(torch.zeros(2, dtype=torch.float64))
    loss = LossConfig(beta=0.5, f_divergence="forward_kl")
    assert preference_loss(policy, nothing, loss).losses.item() == pytest.approx(math.log1p(math.exp(-1.75)))
