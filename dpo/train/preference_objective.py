"""Preference optimization as an objective: pairs, their reference log-probs from the cache, and the loss."""

from dataclasses import dataclass, field

from torch import Tensor

from dpo.config import LossConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import Int64s
from dpo.data.preference_data import PreferenceData
from dpo.data.trees import Layout, TreeBatch
from dpo.loss.accuracy import accuracies
from dpo.loss.pairs import pair_logps
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
    """The loss's named sums over the last step and all ranks; empty before the first step."""

    @property
    def dataset(self) -> TokenizedDataset:
        """Where the groups are."""
        return self.data.dataset

    @property
    def per_token(self) -> bool:
        """Whether the loss weighs tokens."""
        return self.loss_config.ld_alpha is not None

    def count(self, groups: Int64s) -> float:
        """Pairs of these groups, by their weights; or how many groups, where the loss is one of groups."""
        return self.data.count(groups)

    def num_units(self, groups: Int64s) -> int:
        """Pairs of these groups."""
        return int(self.dataset.pairs_per_group[groups].sum())

    def batch(self, groups: Int64s, layout: Layout) -> TreeBatch:
        """Trees of these groups with the reference log-probs of all completions."""
        return self.data.batch(groups, layout)

    def loss(self, logps: Tensor, batch: TreeBatch, sums: MetricSums) -> Tensor:
        """Sum of the pairs' losses; see `Objective.loss`."""
        alpha = self.loss_config.ld_alpha
        assert batch.pair_weights is not None
        policy = pair_logps(logps, batch.pairs, batch.num_tokens, alpha)
        reference = (
            None
            if batch.reference is None
            else pair_logps(batch.reference, batch.pairs, batch.num_tokens, alpha)
        )
        result = preference_loss(policy, reference, self.loss_config, last_step=self.loss_sums)
        chosen, rejected = result.chosen_rewards, result.rejected_rewards
        losses = batch.pair_weights * result.losses
        recorded = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": accuracies(result, policy, self.loss_config, self.dtype),
            "logps/chosen": policy.chosen.detach(),
            "logps/rejected": policy.rejected.detach(),
        }
        sums.add_values({name: values.sum() for name, values in recorded.items()}, len(chosen))
        sums.add_values({"loss": losses.detach().sum()}, batch.loss_count)
        sums.add_totals({f"{LOSS_SUM}{name}": value.detach() for name, value in result.sums.items()})
        # A batch without pairs still depends on the policy, so that its backward pass runs on every rank.
        return losses.sum() + 0.0 * logps.sum()

    def observe(self, totals: dict[str, float]) -> dict[str, float]:
        """Keeps the loss's sums for the next step; see `Objective.observe`."""
        self.loss_sums = {
            name.removeprefix(LOSS_SUM): value for name, value in totals.items() if name.startswith(LOSS_SUM)
        }
        return self.loss_sums

    def restore(self, loss_sums: dict[str, float]) -> None:
        """Continues with the sums of the last step; see `Objective.restore`."""
        self.loss_sums = loss_sums
