"""Experts over a step: the balancing loss of all its tokens, and how evenly they were chosen.

The loss is a product of means over tokens, so that its gradient in one micro-batch needs the picks of the
whole step: they are counted in the first pass of a cached gradient, and added over ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo import distributed
from dpo.model.routers import Balance, Routed, balancing_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBalance:
    """What the balancing loss of a micro-batch needs of all micro-batches and ranks."""

    picks: Tensor
    """(E,) as in `Balance`."""
    num_tokens: Tensor
    """Scalar, as in `Balance`."""

    def part(self, routed: Routed) -> Tensor:
        """A micro-batch's part of the step's loss, with gradient; the parts of all add up."""
        assert routed.balance is not None
        return balancing_loss(self.picks, routed.balance.probabilities, self.num_tokens)


def step_balance(own: Sequence[Routed]) -> StepBalance:
    """The sums over the step, equal on all ranks, which all must call it.

    Args:
        own: Of this rank's micro-batches, each with its balance.
    """
    balances = _balances(own)
    device = balances[0].picks.device
    sums = torch.stack([torch.cat([part.picks, part.num_tokens[None]]) for part in balances]).sum(0)
    whole = torch.from_numpy(distributed.sum_over_ranks(sums.cpu().numpy())).to(device)
    return StepBalance(picks=whole[:-1], num_tokens=whole[-1])


def routing_metrics(own: Sequence[Routed], num_experts: Sequence[int]) -> dict[str, float]:
    """How a step's tokens chose experts, equal on all ranks, which all must call it; empty without experts.

    Args:
        own: Of this rank's micro-batches.
        num_experts: Experts of each layer that has some.

    Returns:
        router/max_load: picks of the busiest expert over the mean expert's, 1 if even, mean over layers;
        router/unused_experts: share of experts that no token chose; router/aux_loss: the balancing loss
        before its weight, where there is one.
    """
    if not own[0].load.numel() and own[0].balance is None:
        return {}
    load = torch.stack([routed.load for routed in own]).sum(0)
    balances = _balances(own)
    parts = [load, *(torch.stack(sums).sum(0) for sums in zip(*map(_sums, balances), strict=True))]
    whole = distributed.sum_over_ranks(torch.cat(parts).cpu().numpy())
    found, rest = dict[str, float](), whole[len(load) :]
    if len(load):
        layers = np.split(whole[: len(load)], np.cumsum(num_experts)[:-1])
        found["router/max_load"] = float(np.mean([layer.max() / layer.mean() for layer in layers]))
        found["router/unused_experts"] = float(np.mean(whole[: len(load)] == 0))
    if balances:
        picks, probabilities = np.split(rest[:-1], 2)
        found["router/aux_loss"] = float(
            balancing_loss(*map(torch.as_tensor, (picks, probabilities, rest[-1])))
        )
    return found


def _balances(own: Sequence[Routed]) -> list[Balance]:
    return [routed.balance for routed in own if routed.balance is not None]


def _sums(balance: Balance) -> tuple[Tensor, Tensor, Tensor]:
    return balance.picks, balance.probabilities.detach(), balance.num_tokens[None]
