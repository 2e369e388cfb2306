"""Preference optimization as an objective: pairs, their reference log-probs from the cache, and the loss."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpo import distributed
from dpo.config import LossConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import Int64s
from dpo.data.preference_data import PreferenceData
from dpo.data.trees import Layout, Tree, TreeBatch
from dpo.loss.accuracy import accuracies
from dpo.loss.catalog import needs_aligned, needs_whole_step
from dpo.loss.pairs import PairLogProbs, aligned_pair_logps, pair_logps
from dpo.loss.preference_loss import preference_loss
from dpo.tracking.metrics import MetricSums

LOSS_SUM = "loss_sum/"
"""Before the names of the totals that belong to the loss."""


@dataclass(slots=True, kw_only=True)
class PreferenceObjective:
    """Minimizes the preference loss, averaged over the pairs of a step, or over its groups."""

    data: PreferenceData
    loss_config: LossConfig
    dtype: str
    """Compute type of the log-probs, which says how far they are rounded."""
    unit: str = "pairs"
    loss_sums: dict[str, float] = field(default_factory=dict)
    """The loss's named sums over all steps so far and all ranks; empty before the first step."""

    @property
    def dataset(self) -> TokenizedDataset:
        """Where the groups are."""
        return self.data.dataset

    @property
    def per_token(self) -> bool:
        """Whether the loss weighs tokens."""
        return self.loss_config.ld_alpha is not None

    @property
    def aligned(self) -> bool:
        """Whether pairs are weighted by how likely the policy is to write them."""
        return needs_aligned(self.loss_config)

    def count(self, groups: Int64s) -> float:
        """Pairs of these groups, by their weights; or how many groups, where the loss is one of groups."""
        return self.data.count(groups)

    def num_units(self, groups: Int64s) -> int:
        """Pairs of these groups."""
        return int(self.dataset.pairs_per_group[groups].sum())

    @property
    def needs_whole_step(self) -> bool:
        """Whether the loss of a pair depends on the step's other pairs."""
        return needs_whole_step(self.loss_config)

    def trees(self, groups: Int64s) -> list[Tree]:
        """Prompt and completions of each group."""
        found = (self.dataset[int(group)] for group in groups)
        return [(group.prompt, group.completions) for group in found]

    def batch(self, groups: Int64s, layout: Layout) -> TreeBatch:
        """Trees of these groups with the reference log-probs of all completions."""
        return self.data.batch(groups, layout)

    def loss(self, logps: Tensor, batch: TreeBatch, sums: MetricSums) -> Tensor:
        """Sum of the pairs' losses; over all ranks where the loss needs the whole step. See `Objective`."""
        alpha = self.loss_config.ld_alpha
        assert batch.pair_weights is not None
        named = (batch.pairs, batch.num_tokens, alpha, batch.mismatched, batch.quantiles)
        policy = aligned_pair_logps(logps, *named) if self.aligned else pair_logps(logps, *named)
        reference = None if batch.reference is None else pair_logps(batch.reference, *named)
        first = 0
        if self.needs_whole_step:
            policy, first = over_ranks(policy)
            reference = None if reference is None else over_ranks(reference)[0]
        result = preference_loss(policy, reference, self.loss_config, so_far=self.loss_sums)
        mine = slice(first, first + len(batch.pairs))
        chosen, rejected = result.chosen_rewards[mine], result.rejected_rewards[mine]
        losses = result.losses if self.needs_whole_step else batch.pair_weights * result.losses
        # A side that a label does not have adds 0, and is not counted.
        num_both = batch.num_chosen + batch.num_rejected - len(chosen)
        both = (batch.pairs >= 0).all(1)
        correct = accuracies(result, policy, self.loss_config, self.dtype)[mine]
        for name, (rewards, logps_of), number in (
            ("chosen", (chosen, policy.chosen), batch.num_chosen),
            ("rejected", (rejected, policy.rejected), batch.num_rejected),
        ):
            of_side = {f"rewards/{name}": rewards.sum(), f"logps/{name}": logps_of[mine].detach().sum()}
            sums.add_values(of_side, number)
        of_pairs = {"rewards/margins": chosen - rejected, "rewards/accuracies": correct}
        sums.add_values({name: (both * values).sum() for name, values in of_pairs.items()}, num_both)
        sums.use_difference("rewards/margins", "rewards/chosen", "rewards/rejected")
        sums.add_values({"loss": losses[mine].detach().sum()}, batch.loss_count)
        counted = not self.needs_whole_step or distributed.is_main()  # or every rank would add all pairs
        sums.add_totals({f"{LOSS_SUM}{name}": counted * value for name, value in result.sums.items()})
        # A batch without pairs still depends on the policy, so that its backward pass runs on every rank.
        return losses.sum() + 0.0 * logps.sum()

    def observe(self, totals: dict[str, float]) -> dict[str, float]:
        """Adds the loss's sums to those of the steps before; see `Objective.observe`."""
        found = {
            name.removeprefix(LOSS_SUM): value for name, value in totals.items() if name.startswith(LOSS_SUM)
        }
        if all(map(math.isfinite, found.values())):  # or every later step would be spoiled too
            self.loss_sums = {name: self.loss_sums.get(name, 0.0) + value for name, value in found.items()}
        return self.loss_sums

    def restore(self, loss_sums: dict[str, float]) -> None:
        """Continues with the sums of the steps before; see `Objective.restore`."""
        self.loss_sums = loss_sums


def over_ranks(own: PairLogProbs) -> tuple[PairLogProbs, int]:
    """The pairs of all ranks in rank order, with gradient to this rank's, and where this rank's begin."""
    values = torch.stack([own.chosen, own.rejected, own.chosen_tokens, own.rejected_tokens]).detach().cpu()
    others = None if own.mismatched is None else own.mismatched.detach().cpu().double().numpy()
    gathered = distributed.gather_objects((values.double().numpy(), others))
    device = own.chosen.device
    parts = [
        PairLogProbs(
            chosen=torch.from_numpy(part[0]).to(device),
            rejected=torch.from_numpy(part[1]).to(device),
            chosen_tokens=torch.from_numpy(part[2]).long().to(device),
            rejected_tokens=torch.from_numpy(part[3]).long().to(device),
            mismatched=None if mismatched is None else torch.from_numpy(mismatched).to(device),
        )
        for part, mismatched in gathered
    ]
    rank = distributed.rank()
    return own.joined(parts, rank), sum(len(part.chosen) for part in parts[:rank])
