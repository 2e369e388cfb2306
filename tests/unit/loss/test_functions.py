"""Each loss: its value by hand, its gradient by finite differences, and properties that always hold."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo.config import LossConfig
from dpo.loss.catalog import LOSSES, loss_problems
from dpo.loss.pairs import PairLogProbs
from dpo.loss.preference_loss import FUNCTIONS, preference_loss

OPTIONS: dict[str, dict[str, Any]] = {
    name: {"type": name}
    | ({"beta": 0.5} if "beta" in kind.uses else {})
    | ({"label_smoothing": 0.25} if "label_smoothing" in kind.uses else {})
    | ({"simpo_gamma": 0.75} if "simpo_gamma" in kind.uses else {})
    for name, kind in LOSSES.items()
}
NAMES = sorted(LOSSES)
SO_FAR = {"num_chosen": 4.0, "chosen_rewards": 2.0, "num_rejected": 2.0, "rejected_rewards": -3.0}
"""Sums of steps before, as they are for bco_pair: a shift of (0.5 - 1.5) / 2."""
LN2 = math.log(2)
LEVEL = 0.5 * math.log(0.5 * (math.exp(2) - 1))
"""beta ln Z of qrpo at beta 0.5."""


def config(name: str, **changed: Any) -> LossConfig:
    made = LossConfig(**{**OPTIONS[name], **changed})
    assert list(loss_problems(made)) == []
    return made


def logps(chosen: list[float], rejected: list[float], dtype: torch.dtype = torch.float64) -> PairLogProbs:
    """Completions of 4 and 2 tokens; no two pairs share a chosen completion."""
    return PairLogProbs(
        chosen=torch.tensor(chosen, dtype=dtype),
        rejected=torch.tensor(rejected, dtype=dtype),
        chosen_tokens=torch.full((len(chosen),), 4),
        rejected_tokens=torch.full((len(chosen),), 2),
        chosen_sequences=torch.arange(len(chosen)),
        mismatched=torch.tensor([-5.0, -7.0], dtype=dtype),  # equal in policy and reference: a KL of 0
        quantiles=torch.tensor([[0.75, 0.25]], dtype=torch.float64).expand(len(chosen), 2),
    )


def value(name: str, *, h_w: float, h_l: float, **changed: Any) -> float:
    """The loss of one pair: reference -8 and -6 nats, so means of -2 + h_w / 4 and -3 + h_l / 2."""
    policy, reference = logps([-8 + h_w], [-6 + h_l]), logps([-8.0], [-6.0])
    return preference_loss(policy, reference, config(name, **changed)).losses.item()


def log_sigmoid(z: float) -> float:
    return -math.log1p(math.exp(-z))


def s(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


# h_w = 1, h_l = -0.6: h = 1.6, beta h = 0.8; per token 0.25 and -0.3: 0.275 with beta; eps = 0.25
BY_HAND = {
    "sigmoid": -0.75 * log_sigmoid(0.8) - 0.25 * log_sigmoid(-0.8),
    "robust": (-0.75 * log_sigmoid(0.8) + 0.25 * log_sigmoid(-0.8)) / 0.5,
    "exo_pair": s(0.8) * (math.log(s(0.8)) - math.log(0.75)) + s(-0.8) * (math.log(s(-0.8)) - math.log(0.25)),
    "ipo": (1.6 - 1.0) ** 2,
    "hinge": 1 - 0.8,
    "nca_pair": -log_sigmoid(0.5) - 0.5 * log_sigmoid(-0.5) - 0.5 * log_sigmoid(0.3),
    "sppo_hard": (1 - 1.0) ** 2 + (-0.6 + 1.0) ** 2,
    "apo_zero": 1 - s(0.5) + s(-0.3),
    "apo_down": s(0.5) + 1 - s(0.8),
    "discopop": (1 - s(16)) * -log_sigmoid(0.8) + s(16) * math.exp(-0.8),
    "sigmoid_norm": -0.75 * log_sigmoid(0.275) - 0.25 * log_sigmoid(-0.275),
    "ipo_norm": (0.25 + 0.3 - 1.0) ** 2,
    "aot": -0.75 * log_sigmoid(0.8) - 0.25 * log_sigmoid(-0.8),  # one pair: DPO
    "aot_unpaired": -0.75 * log_sigmoid(0.8) - 0.25 * log_sigmoid(-0.8),
    "plackett_luce": -log_sigmoid(0.8),
    "simpo": -log_sigmoid(0.5 * (-1.75 + 3.3) - 0.75),
    "orpo": 1.75 - 0.5 * log_sigmoid(odds(-1.75) - odds(-3.3)),
    "sft": 1.75,
    "kto": (s(-0.5) + s(-0.3)) / 2,
    "qrpo": ((0.75 - LEVEL - 0.5) ** 2 + (0.25 - LEVEL + 0.3) ** 2) / 2,
    "bco_pair": -2 * log_sigmoid(0.4),  # rewards 0.5 and -0.3 around their mean 0.1
}
AT_REFERENCE = {
    "sigmoid": LN2,
    "robust": LN2,
    "exo_pair": math.log(0.5) - (math.log(0.75) + math.log(0.25)) / 2,
    "ipo": 1.0,
    "hinge": 1.0,
    "nca_pair": 2 * LN2,
    "sppo_hard": 2.0,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": (LN2 + 1) / 2,
    "sigmoid_norm": LN2,
    "ipo_norm": 1.0,
    "aot": LN2,
    "aot_unpaired": LN2,
    "plackett_luce": LN2,
    "simpo": -log_sigmoid(0.5 * (-2.0 + 3.0) - 0.75),
    "orpo": 2.0 - 0.5 * log_sigmoid(odds(-2.0) - odds(-3.0)),
    "sft": 2.0,
    "bco_pair": 2 * LN2,
    "kto": 0.5,
    "qrpo": ((0.75 - LEVEL) ** 2 + (0.25 - LEVEL) ** 2) / 2,
}


def test_every_name_has_its_function_and_its_numbers() -> None:
    assert set(FUNCTIONS) == set(LOSSES) == set(BY_HAND) == set(AT_REFERENCE)
    assert all(function.__doc__ and "arXiv" in function.__doc__ for function in FUNCTIONS.values())


@pytest.mark.parametrize("name", NAMES)
def test_by_hand(name: str) -> None:
    assert value(name, h_w=1.0, h_l=-0.6) == pytest.approx(BY_HAND[name], rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_that_is_the_reference_gives_the_constant_of_the_docstring(name: str) -> None:
    assert value(name, h_w=0.0, h_l=0.0) == pytest.approx(AT_REFERENCE[name], rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = logps([-8.0, -5.0, -9.0, -7.0], [-6.0, -8.0, -4.0, -7.5])
    start = -12 * torch.rand(8, dtype=torch.float64, generator=generator) - 0.5

    def losses(values: Tensor) -> Tensor:
        policy = PairLogProbs(
            chosen=values[:4],
            rejected=values[4:],
            chosen_tokens=reference.chosen_tokens,
            rejected_tokens=reference.rejected_tokens,
            chosen_sequences=reference.chosen_sequences,
            mismatched=reference.mismatched,
            quantiles=reference.quantiles,
        )
        return preference_loss(policy, reference, config(name), so_far=SO_FAR).losses

    assert torch.autograd.gradcheck(losses, start.requires_grad_())


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"nca_pair", "sppo_hard", "apo_zero", "apo_down"}))
def test_the_loss_falls_as_the_margin_rises(name: str) -> None:
    if name in ("ipo", "sigmoid", "sigmoid_norm", "exo_pair"):  # up to their minimum
        margins = [-6.0, -3.0, 0.0, 0.5]
    else:
        margins = [-6.0, -3.0, 0.0, 1.5]
    found = [value(name, h_w=margin / 2, h_l=-margin / 2) for margin in margins]
    assert found == sorted(found, reverse=True)


MIRRORED: dict[str, Callable[[float, float], float]] = {
    # the loss of a pair and of the same pair with its labels exchanged
    "ipo": lambda kept, swapped: swapped - kept - 4 * 1.6 * 1.0,  # (h + 1)^2 - (h - 1)^2 = 4 h / (2 beta)
    "robust": lambda kept, swapped: swapped - kept - 0.8 / 0.5,  # (1 - eps + eps) beta h / (1 - 2 eps)
    "apo_zero": lambda kept, swapped: kept + swapped - 2,
}


@pytest.mark.parametrize("name", sorted(MIRRORED))
def test_exchanged_labels_mirror_the_loss(name: str) -> None:
    policy, reference = logps([-7.0], [-6.6]), logps([-8.0], [-6.0])
    kept = preference_loss(policy, reference, config(name)).losses.item()

    def exchanged(of: PairLogProbs) -> PairLogProbs:
        return PairLogProbs(
            chosen=of.rejected,
            rejected=of.chosen,
            chosen_tokens=of.rejected_tokens,
            rejected_tokens=of.chosen_tokens,
            chosen_sequences=of.chosen_sequences,
        )

    swapped = preference_loss(exchanged(policy), exchanged(reference), config(name)).losses.item()
    assert MIRRORED[name](kept, swapped) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm", "plackett_luce"])
def test_exchanged_labels_differ_by_the_margin(name: str) -> None:
    """-log sigma(-z) + log sigma(z) = z, as for any Bradley-Terry likelihood."""
    changed = {"label_smoothing": 0.0} if "label_smoothing" in OPTIONS[name] else {}
    one, other = (
        preference_loss(
            logps([-8.0 + sign], [-8.0 - sign]), logps([-8.0], [-8.0]), config(name, **changed)
        ).losses.item()
        for sign in (1, -1)
    )
    expected = 0.5 * (1 / 4 + 1 / 2) if name == "sigmoid_norm" else 0.5 * 2
    assert other - one == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", [-5e3, -300.0, 300.0, 5e3])
def test_extreme_margins_stay_finite_with_their_gradients(
    name: str, dtype: torch.dtype, margin: float
) -> None:
    low = min(margin, -margin) - 10
    policy = logps([low + max(margin, 0)], [low + max(-margin, 0)], dtype)
    policy.chosen.requires_grad_()
    policy.rejected.requires_grad_()
    beta = {"beta": 1.0} if "beta" in OPTIONS[name] else {}
    losses = preference_loss(policy, logps([-10.0], [-10.0], dtype), config(name, **beta)).losses
    assert losses.isfinite().all()
    ends = [policy.chosen, policy.rejected]
    gradients = torch.autograd.grad(losses.sum(), ends, materialize_grads=True)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_a_completion_of_certain_tokens_has_finite_odds() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        policy = logps([0.0], [-3.0], dtype)
        assert preference_loss(policy, None, config("orpo")).losses.isfinite().all()


def test_a_mixture_adds_weighted_losses_and_shows_the_first_ones_rewards() -> None:
    policy, reference = logps([-7.0], [-6.6]), logps([-8.0], [-6.0])
    mixed = LossConfig(
        type=["sigmoid", "hinge", "simpo"], weights=[1.0, 0.5, 2.0], beta=0.5, simpo_gamma=0.75
    )
    alone = [
        LossConfig(type=name, beta=0.5, **({"simpo_gamma": 0.75} if name == "simpo" else {}))
        for name in mixed.type
    ]
    parts = [preference_loss(policy, reference, one) for one in alone]
    found = preference_loss(policy, reference, mixed)
    expected = parts[0].losses + 0.5 * parts[1].losses + 2.0 * parts[2].losses
    assert torch.allclose(found.losses, expected, rtol=1e-14)
    assert torch.equal(found.chosen_rewards, parts[0].chosen_rewards)


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"plackett_luce", "sft"}))
def test_the_likelihood_of_the_chosen_completion_can_be_added_to_any_loss(name: str) -> None:
    policy, reference = logps([-7.0], [-6.6]), logps([-8.0], [-6.0])
    plain = preference_loss(policy, reference, config(name)).losses
    added = preference_loss(policy, reference, config(name, sft_weight=0.5)).losses
    assert (added - plain).item() == pytest.approx(0.5 * 7.0 / 4, rel=1e-12)


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_without_a_reference_run_without_one(name: str) -> None:
    policy = logps([-7.0], [-6.6])
    found = preference_loss(policy, None, config(name))
    assert found.losses.isfinite().all()
    assert found.chosen_rewards.item() == pytest.approx(0.5 * -7 / 4)


def test_rewards_are_per_token_where_the_loss_is() -> None:
    policy, reference = logps([-7.0], [-6.6]), logps([-8.0], [-6.0])
    for name, chosen in (("sigmoid", 1.0), ("ipo", 1.0), ("sigmoid_norm", 1 / 4)):
        found = preference_loss(policy, reference, config(name))
        assert found.chosen_rewards.item() == pytest.approx(0.5 * chosen)


def test_aot_compares_sorted_margins_and_not_pairs() -> None:
    """Policy margins 3 and 1, reference margins 0 and 2: sorted, 1 against 0 and 3 against 2."""
    policy, reference = logps([-3.0, -5.0], [-6.0, -6.0]), logps([-6.0, -5.0], [-6.0, -7.0])
    found = preference_loss(policy, reference, config("aot", label_smoothing=0.0)).losses
    assert found.tolist() == pytest.approx([-log_sigmoid(0.5 * 1), -log_sigmoid(0.5 * 1)], rel=1e-12)


def test_unpaired_aot_compares_sorted_log_ratios() -> None:
    """Chosen log-ratios 3 and 0, rejected 0 and 1: sorted, 0 against 0 and 3 against 1."""
    policy, reference = logps([-3.0, -5.0], [-6.0, -6.0]), logps([-6.0, -5.0], [-6.0, -7.0])
    found = preference_loss(policy, reference, config("aot_unpaired", label_smoothing=0.0)).losses
    assert found.tolist() == pytest.approx([LN2, -log_sigmoid(0.5 * 2)], rel=1e-12)


def test_the_shift_of_bco_is_that_of_the_steps_before_and_has_no_gradient() -> None:
    policy, reference = logps([-7.0, -8.0], [-6.6, -6.0]), logps([-8.0, -8.0], [-6.0, -6.0])
    policy.chosen.requires_grad_()
    first = preference_loss(policy, reference, config("bco_pair"), so_far={})
    assert first.losses[0].item() == pytest.approx(-log_sigmoid(0.5) - log_sigmoid(0.3))
    assert {name: value.item() for name, value in first.sums.items()} == pytest.approx(
        {"num_chosen": 2, "chosen_rewards": 0.5, "num_rejected": 2, "rejected_rewards": -0.3}
    )
    later = preference_loss(policy, reference, config("bco_pair"), so_far=SO_FAR).losses
    assert later[0].item() == pytest.approx(-log_sigmoid(0.5 + 0.5) - log_sigmoid(0.3 - 0.5))
    (slope,) = torch.autograd.grad(later.sum(), policy.chosen)
    assert slope.tolist() == pytest.approx([-0.5 * s(-1.0), -0.5 * s(-0.5)])


ONE_SIDED = [name for name, kind in LOSSES.items() if kind.takes_labels]


@pytest.mark.parametrize("name", ONE_SIDED)
def test_a_pair_is_the_sum_of_its_two_completions_with_labels(name: str) -> None:
    """A side that is missing has 0 nats and 0 tokens; it adds nothing, and gets no gradient."""
    policy, reference = logps([-7.0], [-6.6]), logps([-8.0], [-6.0])

    def only(of: PairLogProbs, side: str) -> PairLogProbs:
        missing = torch.zeros_like(of.chosen)
        other = {"chosen": "rejected", "rejected": "chosen"}[side]
        return replace(of, **{other: missing, f"{other}_tokens": missing.long()})

    def loss_of(*given: PairLogProbs) -> float:
        return preference_loss(*given, config(name), so_far=SO_FAR).losses.item()

    sides = [loss_of(only(policy, side), only(reference, side)) for side in ("chosen", "rejected")]
    both = sum(sides) / 2 if name in ("kto", "qrpo") else sum(sides)  # a mean over completions
    assert loss_of(policy, reference) == pytest.approx(both, rel=1e-12)
    desirable = only(policy, "chosen")
    desirable.rejected.requires_grad_()
    desirable.chosen.requires_grad_()
    losses = preference_loss(desirable, only(reference, "chosen"), config(name), so_far=SO_FAR).losses
    ends = [desirable.chosen, desirable.rejected]
    slopes = torch.autograd.grad(losses.sum(), ends, materialize_grads=True)
    assert slopes[0].item() != 0
    assert slopes[1].item() == 0


@pytest.mark.parametrize("beta", [1e-3, 0.03, 1.0, 50.0])
def test_qrpo_is_least_for_the_optimal_policy_of_uniform_quantiles(beta: float) -> None:
    """Its optimum ref(y) exp(q / beta) / Z is a distribution: the mean of exp(q / beta) / Z over q is 1."""
    shares = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    zeros = torch.zeros_like(shares)
    tokens = torch.ones(len(shares), dtype=torch.long)
    reference = PairLogProbs(chosen=zeros, rejected=zeros, chosen_tokens=tokens, rejected_tokens=0 * tokens)
    reference = replace(reference, quantiles=torch.stack([shares, zeros], 1))

    def losses(ratios: Tensor) -> Tensor:
        return preference_loss(replace(reference, chosen=ratios), reference, config("qrpo", beta=beta)).losses

    log_z = torch.logsumexp(shares / beta, 0) - math.log(len(shares))
    assert losses(shares / beta - log_z).max().item() < 1e-6
    assert losses(shares / beta - log_z + 0.1 / beta).min().item() == pytest.approx(0.01, rel=1e-2)


def test_kto_measures_rewards_from_the_kl_of_mismatched_completions() -> None:
    """h_w = 1, h_l = -0.6; mismatched log-ratios 3, -1 and 1: a KL of 1 nat, which has no gradient."""
    policy, reference = logps([-7.0], [-6.6]), logps([-8.0], [-6.0])
    mismatched = torch.tensor([-2.0, -6.0, -4.0], dtype=torch.float64, requires_grad=True)
    policy = replace(policy, mismatched=mismatched)
    reference = replace(reference, mismatched=torch.full((3,), -5.0, dtype=torch.float64))
    loss = config("kto", desirable_weight=2.0, undesirable_weight=0.5)
    found = preference_loss(policy, reference, loss).losses
    assert found.item() == pytest.approx((2 * (1 - s(0.5 * 0)) + 0.5 * (1 - s(0.5 * 1.6))) / 2, rel=1e-12)
    assert not found.requires_grad
    below = replace(policy, mismatched=torch.tensor([-9.0, -9.0, -9.0], dtype=torch.float64))
    found = preference_loss(below, reference, loss).losses  # an estimate below 0 counts as 0
    assert found.item() == pytest.approx((2 * (1 - s(0.5)) + 0.5 * (1 - s(0.3))) / 2, rel=1e-12)
