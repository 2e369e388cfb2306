"""Losses that compare the pairs of a step: over all ranks they are those of one device.

Not what each rank would find alone.
"""

import math

import pytest
import torch

from dpo.config import LossConfig
from dpo.loss.catalog import LOSSES
from dpo.loss.pairs import PairLogProbs
from dpo.loss.preference_loss import preference_loss


def s(z: float) -> float:
    return 1 / (1 + math.exp(-z))


WHOLE_STEP = [name for name, kind in LOSSES.items() if kind.whole_step]


def logps(values: list[list[float]]) -> PairLogProbs:
    """Chosen, rejected and mismatched log-probs in nats."""
    chosen, rejected, mismatched = (torch.tensor(row, dtype=torch.float64) for row in values)
    tokens = torch.ones(len(chosen), dtype=torch.int64)
    return PairLogProbs(
        chosen=chosen,
        rejected=rejected,
        chosen_tokens=tokens,
        rejected_tokens=tokens,
        mismatched=mismatched,
    )


POLICY = [
    [[-1.0, -9.0], [-2.0, -3.0], [-2.0, -4.0]],  # of rank 0
    [[-5.0, -4.0], [-6.0, -1.0], [-9.0, -7.0]],  # of rank 1
]
REFERENCE = [
    [[-3.0, -4.0], [-4.0, -4.0], [-5.0, -5.0]],
    [[-4.0, -6.0], [-5.0, -2.0], [-5.0, -5.0]],
]


def whole(of: list[list[list[float]]]) -> PairLogProbs:
    return logps([first + second for first, second in zip(*of, strict=True)])


@pytest.mark.parametrize("name", WHOLE_STEP)
def test_joined_over_ranks_it_is_the_loss_of_one_device(name: str) -> None:
    loss = LossConfig(type=name, beta=0.5)
    expected = preference_loss(whole(POLICY), whole(REFERENCE), loss).losses
    for rank in (0, 1):
        parts = [logps(part) for part in POLICY]
        own = parts[rank]
        own.chosen.requires_grad_()
        reference = logps(REFERENCE[rank]).joined([logps(part) for part in REFERENCE], rank)
        found = preference_loss(own.joined(parts, rank), reference, loss).losses
        assert found.tolist() == expected.tolist()
        (slopes,) = torch.autograd.grad(found.sum(), own.chosen)
        assert (slopes != 0).all()
    alone = [
        preference_loss(logps(policy), logps(reference), loss).losses
        for policy, reference in zip(POLICY, REFERENCE, strict=True)
    ]
    assert torch.cat(alone).mean().item() != pytest.approx(expected.mean().item(), rel=1e-3)


def test_the_kl_of_two_devices_is_not_the_mean_of_their_kls() -> None:
    """Mismatched log-ratios 3, 1 and -4, -2: 2 nats on one device, 0 on the other, and 0 over both."""
    loss = LossConfig(type="kto", beta=0.5)
    alone = preference_loss(logps(POLICY[0]), logps(REFERENCE[0]), loss).losses[1].item()
    together = preference_loss(whole(POLICY), whole(REFERENCE), loss).losses[1].item()
    # the second pair's log-ratios are -5 and 1
    assert alone == pytest.approx((s(0.5 * 7) + s(0.5 * -1)) / 2)
    assert together == pytest.approx((s(0.5 * 5) + s(0.5 * 1)) / 2)


def test_bco_takes_its_shift_from_all_steps_before() -> None:
    loss = LossConfig(type="bco_pair", beta=1.0)
    found = [
        preference_loss(logps(policy), logps(reference), loss, so_far={}).sums
        for policy, reference in zip(POLICY, REFERENCE, strict=True)
    ]
    both = {name: sum(float(part[name]) for part in found) for name in found[0]}
    expected = preference_loss(whole(POLICY), whole(REFERENCE), loss, so_far={}).sums
    assert both == {name: value.item() for name, value in expected.items()}
