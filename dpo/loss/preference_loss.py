"""The loss of a configuration: one of `dpo.loss.functions` or a weighted sum of them, and an NLL term.

Training calls it with the policy's log-probs of a micro-batch and the cached ones of the reference.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpo.config import LossConfig
from dpo.config.own import PREFIX, find_function
from dpo.loss import functions, labelled
from dpo.loss.catalog import LOSSES, kind_of, names_of
from dpo.loss.pairs import LossValues, PairLogProbs, Pairs

LossFunction = Callable[[Pairs, LossConfig], Tensor | LossValues]
FUNCTIONS: dict[str, LossFunction] = {
    name: getattr(labelled if hasattr(labelled, name) else functions, name) for name in LOSSES
}
"""Name -> function, for every loss in the catalog."""


def function_of(name: str) -> LossFunction:
    """The function of a loss: of the catalog, or python:module.function.

    Raises:
        UserError: There is no such module or function.
    """
    if name.startswith(PREFIX):
        return find_function(name.removeprefix(PREFIX), "loss.type")
    return FUNCTIONS[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLosses:
    """The loss of each of B pairs, and the implicit rewards."""

    losses: Tensor
    """(B,) with gradient to the policy."""
    chosen_rewards: Tensor
    """(B,) beta * log(policy / reference) of the chosen completion, detached; per token for losses that
    divide by the length; without a reference, beta * log-prob per token."""
    rejected_rewards: Tensor
    """(B,) the same for the rejected completion, detached."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Named sums over these pairs, which the loop adds up over the run; see `LossValues`."""


def preference_loss(
    policy: PairLogProbs,
    reference: PairLogProbs | None,
    loss: LossConfig,
    *,
    so_far: Mapping[str, float] | None = None,
) -> PairLosses:
    """The loss that a configuration asks for.

        w * (sum over i of weight_i * loss_i)  +  sft_weight * (-log pi(y_w|x) / |y_w|)

    The second term is the negative log-likelihood that iterative RPO adds (arXiv 2404.19733, Eq. 1), a mean
    over the tokens of each chosen completion. w is 1, or with `pair_weights` wpo that of `wpo_weights`.

    Args:
        policy: Log-probs of B pairs under the policy, each (B,), with gradient; groups are whole.
        reference: Log-probs of the same pairs under the reference, without gradient; None for losses that
            need none.
        loss: Types, weights and options without `loss_problems`.
        so_far: The losses' named sums over all steps before, empty before the first; None outside training,
            where losses that need them take those of the given pairs.

    Returns:
        (B,) losses and rewards, in the dtype of `policy`; the rewards are those of the first type.
    """
    pairs = Pairs(policy=policy, reference=reference, so_far=so_far)
    names = names_of(loss)
    parts = [_values(function_of(name)(pairs, loss)) for name in names]
    weights = loss.weights or [1.0] * len(names)
    losses = weights[0] * parts[0].losses
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        losses = losses + weight * part.losses
    if loss.pair_weights == "wpo":
        losses = losses * wpo_weights(pairs)
    if loss.sft_weight:
        losses = losses - loss.sft_weight * pairs.chosen_means
    chosen, rejected = _rewards(pairs, names[0])
    return PairLosses(
        losses=losses,
        chosen_rewards=loss.beta * chosen.detach(),
        rejected_rewards=loss.beta * rejected.detach(),
        sums={name: value for part in parts for name, value in part.sums.items()},
    )


def wpo_weights(pairs: Pairs) -> Tensor:
    """How likely the policy is to write both completions, so that its own distribution counts more.

        exp(a_w) exp(a_l),   a = (1/|y|) sum over t of [log pi(y_t|.) - log sum over v of pi(v|.)^2]

    arXiv 2406.11827, Eq. 2, with its sampled alignment: 1 for what the policy would sample, on average.

    Returns:
        (B,) weights above 0, without gradient.
    """
    assert pairs.policy.aligned is not None
    return torch.exp(pairs.policy.aligned).detach()


def _values(result: Tensor | LossValues) -> LossValues:
    return result if isinstance(result, LossValues) else LossValues(losses=result)


def _rewards(pairs: Pairs, name: str) -> tuple[Tensor, Tensor]:
    """The quantities that the loss compares, without beta."""
    if not kind_of(name).needs_reference:
        return pairs.chosen_means, pairs.rejected_means
    if kind_of(name).per_token:
        return (
            pairs.chosen_logratios / pairs.policy.chosen_tokens,
            pairs.rejected_logratios / pairs.policy.rejected_tokens,
        )
    return pairs.chosen_logratios, pairs.rejected_logratios
