"""f-divergences in place of the reverse KL between policy and reference (f-DPO, arXiv 2309.16240).

Where the policy is held to the reference by a divergence with the convex function f, the implicit reward of a
completion is beta f'(pi / ref) up to a constant of the prompt. The losses of the margin take it through here.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor

from dpo.config import LossConfig
from dpo.loss.pairs import Pairs

LARGEST_EXPONENT = 50.0
"""Nats beyond which an exponential goes on as its tangent, so that it and its gradient stay finite."""


def margins(pairs: Pairs, loss: LossConfig) -> Tensor:
    """(B,) h: the difference of f'(pi / ref) between the chosen and the rejected completion.

    With the reverse KL, f'(u) = log u: the difference of log-ratios.
    """
    chosen, rejected = pairs.chosen_logratios, pairs.rejected_logratios
    return derivative(chosen, loss) - derivative(rejected, loss)


def derivative(logratios: Tensor, loss: LossConfig) -> Tensor:
    """f'(u) at u = exp(logratios), less its value at u = 1, so that it is 0 where policy = reference.

        reverse_kl   log u
        forward_kl   1 - 1/u
        js           log(2 u / (1 + u))
        alpha        (1 - u^-a) / a          with a = `loss.f_alpha` in (0, 1)

    arXiv 2309.16240. All increase with u, so that every divergence ranks completions alike; they
    differ in how much a small u costs: js and above all the KL in forward direction spread the policy more.

    Args:
        logratios: (B,) log(pi / ref) of completions, in nats.
        loss: Names the divergence.

    Returns:
        (B,) in the dtype of `logratios`.
    """
    if loss.f_divergence == "forward_kl":
        return 1 - _exp(-logratios)
    if loss.f_divergence == "js":
        return math.log(2) + F.logsigmoid(logratios)
    if loss.f_divergence == "alpha":
        return (1 - _exp(-loss.f_alpha * logratios)) / loss.f_alpha
    return logratios


def _exp(exponents: Tensor) -> Tensor:
    """The exponential up to `LARGEST_EXPONENT`, its tangent beyond."""
    beyond = torch.relu(exponents - LARGEST_EXPONENT)
    return torch.exp(exponents.clamp(max=LARGEST_EXPONENT)) + math.exp(LARGEST_EXPONENT) * beyond
