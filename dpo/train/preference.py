"""Preference optimization as an objective: pairs, their reference log-probs from the cache, and the DPO
loss.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo.config import LossConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import Int64s
from dpo.data.trees import Layout, TreeBatch, group_batch
from dpo.loss import preference_loss
from dpo.monitor import MetricSums


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceObjective:
    """Minimizes the preference loss, averaged over the pairs of a step."""

    dataset: TokenizedDataset
    reference: npt.NDArray[np.float64]
    """(S,) reference log-probs of the data set's sequences, in nats."""
    loss_config: LossConfig
    unit: str = "pairs"

    def count(self, groups: Int64s) -> int:
        """Pairs of these groups."""
        return int(self.dataset.pairs_per_group[groups].sum())

    def num_units(self, groups: Int64s) -> int:
        """Pairs of these groups."""
        return self.count(groups)

    def batch(self, groups: Int64s, layout: Layout) -> TreeBatch:
        """Trees of these groups with the reference log-probs of all completions."""
        batch = group_batch([self.dataset[int(group)] for group in groups], layout)
        return replace(batch, reference=reference_rows(self.dataset, self.reference, groups))

    def loss(self, logps: Tensor, batch: TreeBatch, sums: MetricSums) -> Tensor:
        """Sum of the pairs' losses; see `Objective.loss`."""
        assert batch.reference is not None
        policy_pairs = batch.pair_logps(logps)
        result = preference_loss(policy_pairs, batch.pair_logps(batch.reference), self.loss_config)
        chosen, rejected = result.chosen_rewards, result.rejected_rewards
        recorded = {
            "loss": result.losses.detach(),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": (chosen > rejected).double(),
            "logps/chosen": policy_pairs.chosen.detach(),
            "logps/rejected": policy_pairs.rejected.detach(),
        }
        sums.add_values({name: values.sum() for name, values in recorded.items()}, len(chosen))
        # A batch without pairs still depends on the policy, so that its backward pass runs on every rank.
        return result.losses.sum() + 0.0 * logps.sum()


def reference_rows(dataset: TokenizedDataset, reference: npt.NDArray[np.float64], groups: Int64s) -> Tensor:
    """(S,) reference values of these groups' sequences, in `group_batch`'s order; one 0 for no groups."""
    first, number = dataset.first_sequence[groups], dataset.sequences_per_group[groups]
    values = [reference[start : start + count] for start, count in zip(first, number, strict=True)]
    return torch.from_numpy(np.concatenate(values) if values else np.zeros(1))
