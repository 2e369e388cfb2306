"""The loss of a configuration: one of the functions, or a weighted mixture, and what may be added to any."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dpo.config import LossConfig
from dpo.loss import functions as paired
from dpo.loss import functions as ranking
from dpo.loss import functions as reference_free
from dpo.loss.catalog import LOSSES, names_of
from dpo.loss.pairs import PairLogProbs, Pairs

MODULES = (paired, ranking, reference_free)
FUNCTIONS: dict[str, Callable[[Pairs, LossConfig], Tensor]] = {
    name: next(getattr(module, name) for module in MODULES if hasattr(module, name)) for name in LOSSES
}
"""Name -> function, for every name of the table."""
BY_LENGTH = ("sigmoid_norm", "simpo", "orpo")


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLosses:
    """The loss of each of B pairs, and the implicit rewards it rests on."""

    losses: Tensor
    """(B,) with gradient to the policy."""
    chosen_rewards: Tensor
    """(B,) beta * log(policy / reference) of the chosen completion, detached; a token where the loss counts
    so, and without a reference beta * log-prob a token."""
    rejected_rewards: Tensor
    """(B,) the same of the rejected completion, detached."""


def preference_loss(policy: PairLogProbs, reference: PairLogProbs | None, loss: LossConfig) -> PairLosses:
    """The loss that a configuration asks for.

        sum over i of weight_i * loss_i  +  sft_weight * (-log pi(y_w|x) / |y_w|)

    The second part is the negative log-likelihood that iterative RPO adds (arXiv 2404.19733, Eq. 1), a mean
    over the tokens of each chosen completion.

    Args:
        policy: Log-probs of B pairs under the policy, each (B,), with gradient.
        reference: Log-probs of the same pairs under the reference, without; None for losses that need none.
        loss: Types, weights and options, free of problems.

    Returns:
        (B,) losses and rewards, in the dtype of `policy`; the rewards are those of the first type.
    """
    pairs, names = Pairs(policy=policy, reference=reference), names_of(loss)
    weights = loss.weights or [1.0] * len(names)
    losses = weights[0] * FUNCTIONS[names[0]](pairs, loss)
    for name, weight in zip(names[1:], weights[1:], strict=True):
        losses = losses + weight * FUNCTIONS[name](pairs, loss)
    if loss.sft_weight:
        losses = losses - loss.sft_weight * pairs.chosen_means
    chosen, rejected = _rewards(pairs, names[0])
    return PairLosses(
        losses=losses,
        chosen_rewards=loss.beta * chosen.detach(),
        rejected_rewards=loss.beta * rejected.detach(),
    )


def _rewards(pairs: Pairs, name: str) -> tuple[Tensor, Tensor]:
    """What the loss tells apart, without beta."""
    if not LOSSES[name].needs_reference:
        return pairs.chosen_means, pairs.rejected_means
    if name in BY_LENGTH:
        return (
            pairs.chosen_logratios / pairs.policy.chosen_tokens,
            pairs.rejected_logratios / pairs.policy.rejected_tokens,
        )
    return pairs.chosen_logratios, pairs.rejected_logratios
