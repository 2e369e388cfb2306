"""The preference loss: a pure function of log-probabilities.

Policy and reference enter as summed log-probabilities of the same pairs; where they come from (a live model,
the cache) is not this module's business.
"""

from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor

from dpo.config import LossConfig
from dpo.records import PairLogProbs


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLosses:
    """The loss of each of B pairs, and the implicit rewards it rests on."""

    losses: Tensor
    """(B,) loss in nats, with gradient to the policy."""
    chosen_rewards: Tensor
    """(B,) beta * log(policy / reference) of the chosen completion, detached."""
    rejected_rewards: Tensor
    """(B,) the same of the rejected completion, detached."""


def preference_loss(policy: PairLogProbs, reference: PairLogProbs, loss: LossConfig) -> PairLosses:
    """Direct Preference Optimization with optional label smoothing (conservative DPO).

    Eq. 7 of arXiv 2305.18290, with label smoothing as in the authors' note on conservative DPO:

        h = log(pi(y_w|x) / ref(y_w|x)) - log(pi(y_l|x) / ref(y_l|x))
        loss = -(1 - eps) * log sigmoid(beta * h) - eps * log sigmoid(-beta * h)

    where y_w is the chosen and y_l the rejected completion, beta = `loss.beta` > 0, and eps =
    `loss.label_smoothing` in [0, 0.5) is the assumed share of flipped labels. The implicit reward of y is
    beta * log(pi(y|x) / ref(y|x)) (Eq. 5 less the partition function, which cancels in a pair).

    Args:
        policy: Log-probs of B pairs under the policy, each (B,), with gradient.
        reference: Log-probs of the same pairs under the reference, without.
        loss: Type, beta and label smoothing.

    Returns:
        (B,) losses and rewards, in the dtype of `policy`.
    """
    chosen_logratios = policy.chosen - reference.chosen
    rejected_logratios = policy.rejected - reference.rejected
    logits = loss.beta * (chosen_logratios - rejected_logratios)
    smoothing = loss.label_smoothing
    losses = -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)
    return PairLosses(
        losses=losses,
        chosen_rewards=loss.beta * chosen_logratios.detach(),
        rejected_rewards=loss.beta * rejected_logratios.detach(),
    )
