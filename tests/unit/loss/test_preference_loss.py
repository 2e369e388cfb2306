"""The default loss by hand: Eq. 7 of the paper, conservative DPO, and the implicit rewards."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dpo.config import LossConfig
from dpo.loss.pairs import PairLogProbs
from dpo.loss.preference_loss import PairLosses, preference_loss


def pair_logps(chosen: list[float], rejected: list[float], *, grad: bool = False) -> PairLogProbs:
    tokens = torch.ones(len(chosen), dtype=torch.int64)
    return PairLogProbs(
        chosen=torch.tensor(chosen, dtype=torch.float64, requires_grad=grad),
        rejected=torch.tensor(rejected, dtype=torch.float64, requires_grad=grad),
        chosen_tokens=tokens,
        rejected_tokens=tokens,
    )


def close(values: Tensor, *expected: float) -> bool:
    return values.tolist() == pytest.approx(list(expected), rel=1e-12, abs=1e-15)


def loss_of(margin: float, beta: float, smoothing: float) -> PairLosses:
    """The loss of one pair whose log-ratios differ by `margin` nats."""
    return preference_loss(
        pair_logps([-10.0 + margin], [-20.0]),
        pair_logps([-10.0], [-20.0]),
        LossConfig(beta=beta, label_smoothing=smoothing),
    )


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_equal_policies_give_ln_2_and_rewards_of_zero(beta: float, smoothing: float) -> None:
    result = loss_of(0.0, beta, smoothing)
    assert close(result.losses, math.log(2))
    assert close(result.chosen_rewards, 0.0)
    assert close(result.rejected_rewards, 0.0)


def test_the_loss_is_minus_log_sigmoid_of_beta_times_the_difference_of_log_ratios() -> None:
    # chosen: -8 - -10 = 2; rejected: -9 - -6 = -3; h = 5; beta h = 0.5; -log sigmoid(0.5) = log(1 + e^-0.5)
    result = preference_loss(pair_logps([-8.0], [-9.0]), pair_logps([-10.0], [-6.0]), LossConfig(beta=0.1))
    assert close(result.losses, math.log(1 + math.exp(-0.5)))
    assert close(result.chosen_rewards, 0.2)
    assert close(result.rejected_rewards, -0.3)


def test_label_smoothing_adds_the_loss_of_the_flipped_pair() -> None:
    # beta h = 2: 0.75 log(1 + e^-2) + 0.25 log(1 + e^2)
    expected = 0.75 * math.log(1 + math.exp(-2)) + 0.25 * math.log(1 + math.exp(2))
    assert close(loss_of(4.0, 0.5, 0.25).losses, expected)


def test_a_margin_of_thousands_of_nats_neither_overflows_nor_vanishes() -> None:
    assert close(loss_of(-40000.0, 0.1, 0.0).losses, 4000.0)
    assert close(loss_of(40000.0, 0.1, 0.0).losses, 0.0)
    assert close(loss_of(40000.0, 0.1, 0.1).losses, 400.0)  # a tenth of the flipped pair's 4000


def test_every_pair_has_its_own_loss_in_order() -> None:
    result = preference_loss(
        pair_logps([-1.0, -2.0], [-1.0, -2.0]), pair_logps([-1.0, -3.0], [-1.0, -1.0]), LossConfig(beta=1.0)
    )
    # the second: 1 - -1 = 2
    assert close(result.losses, math.log(2), math.log(1 + math.exp(-2)))


def test_the_gradient_is_the_papers() -> None:
    # The paper's gradient: d loss / d log pi(y_w) = -beta sigmoid(r_l - r_w), and its opposite for y_l.
    policy = pair_logps([-8.0], [-9.0], grad=True)
    preference_loss(policy, pair_logps([-10.0], [-6.0]), LossConfig(beta=0.1)).losses.sum().backward()
    weight = 0.1 / (1 + math.exp(0.5))
    assert policy.chosen.grad is not None
    assert policy.rejected.grad is not None
    assert close(policy.chosen.grad, -weight)
    assert close(policy.rejected.grad, weight)


def test_rewards_carry_no_gradient() -> None:
    policy = pair_logps([-8.0], [-9.0], grad=True)
    result = preference_loss(policy, pair_logps([-10.0], [-6.0]), LossConfig())
    assert result.losses.requires_grad
    assert not result.chosen_rewards.requires_grad
    assert not result.rejected_rewards.requires_grad


def test_wpo_weighs_a_pair_by_how_likely_the_policy_is_to_write_it() -> None:
    """Two pairs of 4 and 2 tokens; the weights' logarithms are -1/4 - 1/2 and 1/4 - 1."""
    tokens = {"chosen_tokens": torch.tensor([4, 4]), "rejected_tokens": torch.tensor([2, 2])}
    chosen = torch.tensor([-1.0, -8.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-1.0, -6.0], dtype=torch.float64)
    policy = PairLogProbs(chosen=chosen, rejected=rejected, **tokens)
    policy = replace(policy, aligned=torch.tensor([-0.75, -0.75], dtype=torch.float64))
    reference = PairLogProbs(chosen=chosen.detach() - 1, rejected=rejected, **tokens)
    plain = preference_loss(policy, reference, LossConfig(beta=0.5)).losses
    found = preference_loss(policy, reference, LossConfig(beta=0.5, pair_weights="wpo", sft_weight=2)).losses
    expected = math.exp(-0.75) * plain - 2 * chosen / 4  # the sft term is not weighted
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_mpo_is_a_mixture() -> None:
    policy, reference = pair_logps([-8.0], [-9.0]), pair_logps([-10.0], [-6.0])
    mpo = LossConfig(type=["sigmoid", "bco_pair", "sft"], weights=[0.8, 0.2, 1.0])
    mixed = preference_loss(policy, reference, mpo, so_far={})
    bco = math.log(1 + math.exp(-0.2)) + math.log(1 + math.exp(-0.3))
    assert close(mixed.losses, 0.8 * math.log(1 + math.exp(-0.5)) + 0.2 * bco + 8)
    assert close(mixed.chosen_rewards, 0.2)
