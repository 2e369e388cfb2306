"""Preference optimization as an objective: pairs, their reference log-probs from the cache, and the DPO
loss.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo.config import LossConfig
from dpo.data.batches import RowBatch, group_batch
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import Int64s
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

    def batch(self, groups: Int64s) -> RowBatch:
        """Rows of all completions of these groups."""
        return group_batch([self.dataset[int(group)] for group in groups])

    def loss(self, logps: Tensor, batch: RowBatch, groups: Int64s, sums: MetricSums) -> Tensor:
        """Sum of the pairs' losses; see `Objective.loss`."""
        reference = reference_rows(self.dataset, self.reference, groups).to(logps.device)
        policy_pairs = batch.pair_logps(logps)
        result = preference_loss(policy_pairs, batch.pair_logps(reference), self.loss_config)
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
        totals = torch.stack([values.sum() for values in recorded.values()]).tolist()
        for name, total in zip(recorded, totals, strict=True):
            sums.add(name, total, len(chosen))
        # A batch without pairs still depends on the policy, so that its backward pass runs on every rank.
        return result.losses.sum() + 0.0 * logps.sum()


def reference_rows(dataset: TokenizedDataset, reference: npt.NDArray[np.float64], groups: Int64s) -> Tensor:
    """(S,) reference values of the rows that `group_batch` makes of these groups; one 0 for no groups."""
    first, number = dataset.first_sequence[groups], dataset.sequences_per_group[groups]
    values = [reference[start : start + count] for start, count in zip(first, number, strict=True)]
    return torch.from_numpy(np.concatenate(values) if values else np.zeros(1))
