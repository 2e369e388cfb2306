"""Held-out loss, rewards and accuracy of a policy, from the cache and one value a pair.

Law 7: every pair is scored once by one rank, and all ranks hold all values, so that means and intervals are
those of the whole set, whatever the number of ranks or the batch size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo import distributed
from dpo.config import LossConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import share
from dpo.data.preference_data import PreferenceData
from dpo.data.prefetch import prefetch
from dpo.data.trees import Layout, TreeBatch
from dpo.loss.pairs import pair_logps
from dpo.loss.preference_loss import preference_loss

Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScores:
    """One value for each of P pairs, in the order of the data set."""

    groups: npt.NDArray[np.int64]
    """(P,) the pair's group: pairs of one prompt are not independent."""
    losses: Float64s
    """(P,) by the pairs' weights."""
    units: Float64s
    """(P,) what each pair adds to what the mean loss is over; 1 where nothing is weighted."""
    chosen_rewards: Float64s
    """(P,) beta * log(policy / reference) of the chosen completion."""
    rejected_rewards: Float64s
    chosen_logps: Float64s
    """(P,) summed log-prob under the policy, in nats."""
    rejected_logps: Float64s
    reference_logps: Float64s
    """(P, 2) summed log-probs of chosen and rejected under the reference, in nats; NaN where the loss needs
    none."""
    chosen_tokens: npt.NDArray[np.int64]
    """(P,) tokens of the chosen completion."""
    rejected_tokens: npt.NDArray[np.int64]

    @property
    def margins(self) -> Float64s:
        """(P,) chosen less rejected reward."""
        return self.chosen_rewards - self.rejected_rewards

    @property
    def correct(self) -> Float64s:
        """(P,) 1 where the chosen completion has the higher reward, else 0."""
        return (self.margins > 0).astype(np.float64)

    def means(self) -> dict[str, float]:
        """The metrics under the names that training logs."""
        return {
            "eval/loss": float(self.losses.sum() / self.units.sum()),
            "eval/rewards/chosen": float(self.chosen_rewards.mean()),
            "eval/rewards/rejected": float(self.rejected_rewards.mean()),
            "eval/rewards/margins": float(self.margins.mean()),
            "eval/rewards/accuracies": float(self.correct.mean()),
            "eval/logps/chosen": float(self.chosen_logps.mean()),
            "eval/logps/rejected": float(self.rejected_logps.mean()),
        }


def score_pairs(
    score: Callable[..., Tensor],
    data: PreferenceData,
    loss: LossConfig,
    *,
    layout: Layout,
    budget: int,
    device: torch.device,
) -> PairScores:
    """Scores every pair of a data set, spread over the ranks. All ranks must call it.

    Args:
        score: The policy: a batch of S rows on `device` -> (S,) log-probs in nats, or those of tokens with
            `per_token`.
        data: Held-out groups and their reference log-probs.
        loss: The training loss.
        layout: How the policy takes its batches.
        budget: Most tokens of a batch, padding included.
        device: Where batches belong.
    """
    dataset, alpha = data.dataset, loss.ld_alpha
    sizes = dataset.sizes(np.arange(len(dataset)), layout)
    shares = share(sizes, world_size=distributed.world_size(), budget=budget)
    columns: list[list[npt.NDArray[np.float64]]] = []
    mine = shares[distributed.rank()]

    def build(positions: list[int]) -> TreeBatch:
        return data.batch(np.asarray(positions, dtype=np.int64), layout).to(device)

    for positions, batch in zip(mine, prefetch(map(build, mine)), strict=True):
        with torch.no_grad():
            logps = score(
                batch, per_token=alpha is not None
            )  # also without groups: ranks make the same number of calls
        if not positions:
            continue
        policy = pair_logps(logps, batch.pairs, batch.num_tokens, alpha)
        reference = (
            None
            if batch.reference is None
            else pair_logps(batch.reference, batch.pairs, batch.num_tokens, alpha)
        )
        result = preference_loss(policy, reference, loss)
        assert batch.pair_weights is not None
        unknown = torch.full_like(policy.chosen, torch.nan)
        pairs = np.concatenate([_pairs(dataset, position) for position in positions])
        values = (
            batch.pair_weights * result.losses,
            result.chosen_rewards,
            result.rejected_rewards,
            policy.chosen,
            policy.rejected,
            reference.chosen if reference else unknown,
            reference.rejected if reference else unknown,
        )
        columns.append([pairs, *(value.double().cpu().numpy() for value in values)])
    values_here = (
        np.concatenate([np.stack(part) for part in columns], axis=1) if columns else np.zeros((8, 0))
    )
    everything = np.concatenate(distributed.gather_objects(values_here), axis=1)
    everything = everything[:, np.argsort(everything[0], kind="stable")]
    first = np.repeat(dataset.first_sequence, dataset.pairs_per_group)  # (P,)
    sequences = first[:, None] + dataset.pairs  # (P, 2)
    tokens = dataset.completion_tokens[sequences]
    return PairScores(
        groups=np.repeat(np.arange(len(dataset)), dataset.pairs_per_group),
        losses=everything[1],
        units=data.units,
        chosen_rewards=everything[2],
        rejected_rewards=everything[3],
        chosen_logps=everything[4],
        rejected_logps=everything[5],
        reference_logps=everything[6:].T,
        chosen_tokens=tokens[:, 0],
        rejected_tokens=tokens[:, 1],
    )


def _pairs(dataset: TokenizedDataset, group: int) -> Float64s:
    """Numbers of the group's pairs within the data set; exact in float64."""
    return np.arange(dataset.group_pairs[group], dataset.group_pairs[group + 1], dtype=np.float64)
