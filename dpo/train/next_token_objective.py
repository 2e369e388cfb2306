"""Supervised fine-tuning as an objective: next tokens of text, or chosen completions given their prompts.

The paper's first stage, its preferred-FT baseline, and how to pretrain a small base model. A block of text is
a group with one completion and no pairs: data, plan, engine and loop are those of preference training.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo import distributed
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import Int64s, share
from dpo.data.prefetch import prefetch
from dpo.data.records import NO_RIVAL, num_trained
from dpo.data.trees import Layout, Tree, TreeBatch, tree_batch
from dpo.tracking.metrics import MetricSums


@dataclass(frozen=True, slots=True, kw_only=True)
class NextTokenObjective:
    """Minimizes the negative log-likelihood, averaged over the completion tokens of a step."""

    dataset: TokenizedDataset
    unit: str = "sequences"
    per_token: bool = False
    aligned: bool = False
    needs_whole_step: bool = False

    def trees(self, groups: Int64s) -> list[Tree]:
        """The prompts of these groups with their chosen completions, or with the only one."""
        found: list[Tree] = []
        for group in (self.dataset[int(index)] for index in groups):
            wanted = dict.fromkeys(pair.chosen for pair in group.pairs if pair.chosen != NO_RIVAL)
            if not group.pairs:  # a block of text
                wanted = {0: None}
            found.append((group.prompt, [group.completions[index] for index in wanted]))
        return found

    def count(self, groups: Int64s) -> int:
        """Completion tokens of these groups that are trained on."""
        return sum(num_trained(ids) for _, completions in self.trees(groups) for ids in completions)

    def num_units(self, groups: Int64s) -> int:
        """Sequences of these groups."""
        return sum(len(completions) for _, completions in self.trees(groups))

    def batch(self, groups: Int64s, layout: Layout) -> TreeBatch:
        """Trees of these sequences."""
        return tree_batch(self.trees(groups), layout)

    def loss(self, logps: Tensor, batch: TreeBatch, sums: MetricSums) -> Tensor:
        """Sum of the tokens' losses; see `Objective.loss`."""
        sums.add_values({"loss": -logps.detach().sum()}, len(batch.targets))
        return -logps.sum()

    def observe(self, totals: dict[str, float]) -> dict[str, float]:
        """The loss needs nothing of the whole step; see `Objective.observe`."""
        return {}

    def restore(self, loss_sums: dict[str, float]) -> None:
        """Nothing to restore; see `Objective.restore`."""


def held_out_loss(
    score: Callable[[TreeBatch], Tensor],
    dataset: TokenizedDataset,
    *,
    layout: Layout,
    budget: int,
    device: torch.device,
) -> dict[str, float]:
    """{"eval/loss": nats per token} over all sequences of a data set and all ranks.

    Args:
        score: (S,) log-probs of a batch, without gradient.
        dataset: The held-out data.
        layout: How the batches are laid out.
        budget: Tokens of one batch.
        device: Where batches belong.
    """
    objective, sums = NextTokenObjective(dataset=dataset), MetricSums()
    everything = np.arange(len(dataset))
    shares = share(dataset.sizes(everything, layout), world_size=distributed.world_size(), budget=budget)

    def build(positions: list[int]) -> TreeBatch:
        return objective.batch(everything[positions], layout).to(device)

    for batch in prefetch(map(build, shares[distributed.rank()])):
        sums.add_values({"eval/loss": -score(batch).sum()}, len(batch.targets))
    return sums.means()
