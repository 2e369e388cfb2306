"""Losses of completions by themselves: desirable or undesirable, with or without a rival of the same prompt.

The notation is that of `dpo.loss.functions`. The chosen completion of a pair is desirable, the rejected one
undesirable. A completion with a label is a pair with one side; the other adds nothing.
"""

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor

from dpo.config import LossConfig
from dpo.loss.pairs import LossValues, Pairs

NUM_CHOSEN, CHOSEN = "num_chosen", "chosen_rewards"
NUM_REJECTED, REJECTED = "num_rejected", "rejected_rewards"


def bco_pair(pairs: Pairs, loss: LossConfig) -> LossValues:
    """BCO: a classifier of completions whose logit is the reward, shifted to lie between the two kinds.

        -log sigma(beta h_w - delta) - log sigma(delta - beta h_l)

    arXiv 2404.04656: delta = (E[beta h_w] + E[beta h_l]) / 2, without gradient. The means run over all steps
    before, each with the rewards of its time, and so delta is 0 in the first step; outside training they are
    over the given pairs. 2 ln 2 for a pair where policy = reference.
    """
    chosen, rejected = loss.beta * pairs.chosen_logratios, loss.beta * pairs.rejected_logratios
    sums = {
        NUM_CHOSEN: pairs.has_chosen.sum(),
        CHOSEN: chosen.detach().sum(),  # a side that is missing adds 0
        NUM_REJECTED: pairs.has_rejected.sum(),
        REJECTED: rejected.detach().sum(),
    }
    so_far = sums if pairs.so_far is None else pairs.so_far
    shift = (_mean(so_far, CHOSEN, NUM_CHOSEN) + _mean(so_far, REJECTED, NUM_REJECTED)) / 2
    losses = pairs.by_side(-F.logsigmoid(chosen - shift), -F.logsigmoid(shift - rejected))
    return LossValues(losses=losses, sums=sums)


def kto(pairs: Pairs, loss: LossConfig) -> Tensor:
    """KTO: the utility that prospect theory gives to a reward, against what the policy gains on average.

        [l_w (1 - sigma(beta (h_w - z))) + l_l (1 - sigma(beta (z - h_l)))] / (number of sides)

    arXiv 2402.01306: z = max(0, E[log pi(y'|x) - log ref(y'|x)]) without gradient, the KL to the
    reference as the paper estimates it, over all prompts x of the optimizer step with a completion y' of
    another prompt; l_w = `loss.desirable_weight` and l_l = `loss.undesirable_weight`, both > 0. For labels
    such as thumbs up and down. (l_w + l_l) / 4 for a pair where policy = reference.
    """
    assert pairs.kl is not None
    desirable = loss.desirable_weight * torch.sigmoid(loss.beta * (pairs.kl - pairs.chosen_logratios))
    undesirable = loss.undesirable_weight * torch.sigmoid(loss.beta * (pairs.rejected_logratios - pairs.kl))
    return pairs.by_side(desirable, undesirable) / (pairs.has_chosen.long() + pairs.has_rejected.long())


def qrpo(pairs: Pairs, loss: LossConfig) -> Tensor:
    """QRPO: regression to the policy that is optimal for a completion's quantile reward.

        [(q_w - beta ln Z - beta h_w)^2 + (q_l - beta ln Z - beta h_l)^2] / (number of sides)

    arXiv 2507.08068, Eq. 11: q = P(R(y') <= R(y)) over completions y' of the reference to the same prompt,
    estimated by `Pairs.quantiles`. Under the reference q is uniform in [0, 1], and so the partition function
    has a closed form, Z = beta (exp(1 / beta) - 1), whose logarithm is computed as
    ln beta + 1 / beta + ln(1 - exp(-1 / beta)). beta > 0. [(q_w - beta ln Z)^2 + (q_l - beta ln Z)^2] / 2 for
    a pair where policy = reference.
    """
    assert pairs.policy.quantiles is not None
    level = loss.beta * (math.log(loss.beta) + math.log1p(-math.exp(-1 / loss.beta))) + 1
    of_chosen, of_rejected = pairs.policy.quantiles.unbind(1)
    chosen = (of_chosen - level - loss.beta * pairs.chosen_logratios) ** 2
    rejected = (of_rejected - level - loss.beta * pairs.rejected_logratios) ** 2
    return pairs.by_side(chosen, rejected) / (pairs.has_chosen.long() + pairs.has_rejected.long())


def _mean(sums: Mapping[str, float] | Mapping[str, Tensor], total: str, number: str) -> float | Tensor:
    """The mean of a kind's rewards, 0 before there are any."""
    return sums[total] / max(sums[number], 1) if number in sums else 0.0
