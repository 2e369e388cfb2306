"""What a loss reads, the same pairs under policy and reference, and what it returns.

`pair_logps` makes them from the log-probs of a micro-batch, one value per sequence or per token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PairLogProbs:
    """Summed log-probabilities in nats and completion lengths of B pairs.

    A completion with a label instead of a rival is a pair with one side: the other has 0 nats and 0 tokens.
    """

    chosen: Tensor
    """(B,) log p(chosen | prompt), float32 or float64."""
    rejected: Tensor
    """(B,) log p(rejected | prompt), same dtype."""
    chosen_tokens: Tensor
    """(B,) int64, number of tokens of the chosen completion."""
    rejected_tokens: Tensor
    """(B,) int64, number of tokens of the rejected completion."""
    chosen_sequences: Tensor | None = None
    """(B,) int64, index of the chosen completion, equal in pairs that share it; for losses over rankings."""
    aligned: Tensor | None = None
    """(B,) log-prob per token of the chosen plus that of the rejected completion, each token's less the
    logarithm of the sum of all tokens' squared probabilities; no gradient. None where no weights need it."""
    mismatched: Tensor | None = None
    """(M,) log p(completion of another prompt | prompt); None for losses that need none."""
    quantiles: Tensor | None = None
    """(B, 2) share of the reference's completions that score no more than the chosen and the rejected one;
    None for losses that need none."""

    def joined(self, parts: Sequence["PairLogProbs"], own: int) -> "PairLogProbs":
        """The pairs of all ranks, with this rank's own tensors, and their gradient, at place `own`.

        Args:
            parts: Of every rank, without gradient.
            own: This rank's place among them.
        """
        all_ranks = [*parts[:own], self, *parts[own + 1 :]]
        return PairLogProbs(
            chosen=torch.cat([part.chosen for part in all_ranks]),
            rejected=torch.cat([part.rejected for part in all_ranks]),
            chosen_tokens=torch.cat([part.chosen_tokens for part in all_ranks]),
            rejected_tokens=torch.cat([part.rejected_tokens for part in all_ranks]),
            mismatched=_joined([part.mismatched for part in all_ranks]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """B pairs of whole groups; the pairs of a group are contiguous."""

    policy: PairLogProbs
    """With gradient."""
    reference: PairLogProbs | None
    """Without gradient; None for losses that need none."""
    so_far: Mapping[str, float] | None = None
    """The named sums (see `LossValues`) over all steps before and all ranks, empty before the first; None
    outside training."""

    @property
    def has_chosen(self) -> Tensor:
        """(B,) bool, whether the pair has a chosen, or desirable, completion."""
        return self.policy.chosen_tokens > 0

    @property
    def has_rejected(self) -> Tensor:
        """(B,) bool, whether the pair has a rejected, or undesirable, completion."""
        return self.policy.rejected_tokens > 0

    def by_side(self, of_chosen: Tensor, of_rejected: Tensor) -> Tensor:
        """(B,) the sum of what each completion adds, (B,) each; a side that is missing adds 0."""
        return torch.where(self.has_chosen, of_chosen, 0.0) + torch.where(self.has_rejected, of_rejected, 0.0)

    @property
    def kl(self) -> Tensor | None:
        """Scalar: KL(policy || reference) in nats, as KTO estimates it from mismatched completions."""
        if self.reference is None or self.policy.mismatched is None or self.reference.mismatched is None:
            return None
        return (self.policy.mismatched - self.reference.mismatched).mean().clamp(min=0).detach()

    @property
    def chosen_logratios(self) -> Tensor:
        """(B,) log(policy / reference) of the chosen completion, in nats."""
        assert self.reference is not None
        return self.policy.chosen - self.reference.chosen

    @property
    def rejected_logratios(self) -> Tensor:
        """(B,) log(policy / reference) of the rejected completion, in nats."""
        assert self.reference is not None
        return self.policy.rejected - self.reference.rejected

    @property
    def margins(self) -> Tensor:
        """(B,) log-ratio of the chosen minus that of the rejected completion, in nats."""
        return self.chosen_logratios - self.rejected_logratios

    @property
    def chosen_means(self) -> Tensor:
        """(B,) log-prob per token of the chosen completion under the policy, in nats."""
        return self.policy.chosen / self.policy.chosen_tokens.clamp(min=1)

    @property
    def rejected_means(self) -> Tensor:
        """(B,) log-prob per token of the rejected completion under the policy, in nats."""
        return self.policy.rejected / self.policy.rejected_tokens.clamp(min=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LossValues:
    """What a loss returns that needs to know of the whole step; others return their (B,) losses alone."""

    losses: Tensor
    """(B,) with gradient to the policy."""
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Named scalar sums over these B pairs, also where B is 0. The loop adds them up over micro-batches,
    ranks and steps; the next step's loss finds them in `Pairs.so_far`, also after a resume."""


def pair_logps(
    logps: Tensor,
    pairs: Tensor,
    num_tokens: Tensor,
    ld_alpha: float | None = None,
    mismatched: Tensor | None = None,
    quantiles: Tensor | None = None,
) -> PairLogProbs:
    """Selects the values of pairs from one value per sequence, or with `ld_alpha` from one per token.

    `ld_alpha` (LD-DPO, arXiv 2409.06411): the first min(|y_w|, |y_l|) tokens of both completions count fully,
    the rest of the longer one `ld_alpha` times.

    Args:
        logps: (S,) summed log-probs in nats; with `ld_alpha` (N,) log-probs of tokens.
        pairs: (B, 2) int64, sequence indices of the chosen and the rejected completion; below 0 for a side
            that is missing, where there is no `ld_alpha`.
        num_tokens: (S,) int64, completion tokens of each sequence.
        ld_alpha: Weight of the tokens beyond the shorter length, in [0, 1].
        mismatched: (M,) int64, sequences whose completion belongs to another prompt.
        quantiles: (S,) of the sequences' scores; see `PairLogProbs`.

    Returns:
        (B,) values; float64 with `ld_alpha`, else in the dtype of `logps`.
    """
    present, (chosen, rejected) = pairs.T >= 0, pairs.T.clamp(min=0)
    tokens = torch.where(present, num_tokens[pairs.T.clamp(min=0)], 0)
    if ld_alpha is None:
        of_chosen = torch.where(present[0], logps[chosen], 0.0)
        of_rejected = torch.where(present[1], logps[rejected], 0.0)
    else:
        # One product per pair and token: sums from one cumulative sum would not be deterministic on GPUs.
        ends, place, values = (
            num_tokens.cumsum(0),
            torch.arange(len(logps), device=logps.device),
            logps.double(),
        )

        def weighted(sequences: Tensor) -> Tensor:
            end = ends[sequences, None]
            start = end - num_tokens[sequences, None]
            within = (place >= start) & (place < end)  # (B, N)
            shared = place < start + torch.minimum(*tokens)[:, None]
            return torch.where(within, torch.where(shared, values, ld_alpha * values), 0.0).sum(1)

        of_chosen, of_rejected = weighted(chosen), weighted(rejected)
    return PairLogProbs(
        chosen=of_chosen,
        rejected=of_rejected,
        chosen_tokens=tokens[0],
        rejected_tokens=tokens[1],
        chosen_sequences=chosen,
        mismatched=None if mismatched is None else logps[mismatched],
        quantiles=None if quantiles is None else quantiles[pairs.clamp(min=0)],
    )


def aligned_pair_logps(
    values: Tensor,
    pairs: Tensor,
    num_tokens: Tensor,
    ld_alpha: float | None = None,
    mismatched: Tensor | None = None,
    quantiles: Tensor | None = None,
) -> PairLogProbs:
    """`pair_logps` of values with a second column, (S, 2), for weights by the policy's own samples."""
    plain = pair_logps(values[:, 0], pairs, num_tokens, ld_alpha, mismatched, quantiles)
    means = values[:, 1].detach() / num_tokens.clamp(min=1)
    return replace(plain, aligned=means[pairs[:, 0]] + means[pairs[:, 1]])


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """The tensors one after the other; None where there are none."""
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None
