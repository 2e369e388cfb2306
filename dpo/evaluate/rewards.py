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
from dpo.data.prefetch import prefetch
from dpo.data.trees import Layout, TreeBatch, group_batch
from dpo.loss import preference_loss

Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScores:
    """One value for each of P pairs, in the order of the data set."""

    groups: npt.NDArray[np.int64]
    """(P,) the pair's group: pairs of one prompt are not independent."""
    losses: Float64s
    chosen_rewards: Float64s
    """(P,) beta * log(policy / reference) of the chosen completion."""
    rejected_rewards: Float64s
    chosen_logps: Float64s
    """(P,) summed log-prob under the policy, in nats."""
    rejected_logps: Float64s
    reference_logps: Float64s
    """(P, 2) summed log-probs of chosen and rejected under the reference, in nats."""
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
            "eval/loss": float(self.losses.mean()),
            "eval/rewards/chosen": float(self.chosen_rewards.mean()),
            "eval/rewards/rejected": float(self.rejected_rewards.mean()),
            "eval/rewards/margins": float(self.margins.mean()),
            "eval/rewards/accuracies": float(self.correct.mean()),
            "eval/logps/chosen": float(self.chosen_logps.mean()),
            "eval/logps/rejected": float(self.rejected_logps.mean()),
        }


def score_pairs(
    score: Callable[[TreeBatch], Tensor],
    dataset: TokenizedDataset,
    reference: Float64s,
    loss: LossConfig,
    *,
    layout: Layout,
    budget: int,
    device: torch.device,
) -> PairScores:
    """Scores every pair of a data set, spread over the ranks. All ranks must call it.

    Args:
        score: The policy: a batch of S rows on `device` -> (S,) log-probs in nats.
        dataset: Held-out groups.
        reference: (S,) reference log-probs of the data set's sequences, in nats.
        loss: The training loss.
        layout: How the policy takes its batches.
        budget: Most tokens of a batch, padding included.
        device: Where batches belong.
    """
    sizes = dataset.sizes(np.arange(len(dataset)), layout)
    shares = share(sizes, world_size=distributed.world_size(), budget=budget)
    columns: list[list[npt.NDArray[np.float64]]] = []
    mine = shares[distributed.rank()]

    def build(positions: list[int]) -> TreeBatch:
        return group_batch([dataset[position] for position in positions], layout).to(device)

    for positions, batch in zip(mine, prefetch(build, mine), strict=True):
        with torch.no_grad():
            logps = score(batch)  # also without groups: ranks make the same number of calls
        if not positions:
            continue
        rows = [_rows(dataset, reference, position) for position in positions]
        reference_pairs = batch.pair_logps(torch.from_numpy(np.concatenate(rows)).to(logps.device))
        policy_pairs = batch.pair_logps(logps)
        result = preference_loss(policy_pairs, reference_pairs, loss)
        pairs = np.concatenate([_pairs(dataset, position) for position in positions])
        values = (
            result.losses,
            result.chosen_rewards,
            result.rejected_rewards,
            policy_pairs.chosen,
            policy_pairs.rejected,
        )
        columns.append([pairs, *(value.double().cpu().numpy() for value in values)])
    values_here = (
        np.concatenate([np.stack(part) for part in columns], axis=1) if columns else np.zeros((6, 0))
    )
    everything = np.concatenate(distributed.gather_objects(values_here), axis=1)
    everything = everything[:, np.argsort(everything[0], kind="stable")]
    first = np.repeat(dataset.first_sequence, dataset.pairs_per_group)  # (P,)
    sequences = first[:, None] + dataset.pairs  # (P, 2)
    tokens = dataset.completion_tokens[sequences]
    return PairScores(
        groups=np.repeat(np.arange(len(dataset)), dataset.pairs_per_group),
        losses=everything[1],
        chosen_rewards=everything[2],
        rejected_rewards=everything[3],
        chosen_logps=everything[4],
        rejected_logps=everything[5],
        reference_logps=reference[sequences],
        chosen_tokens=tokens[:, 0],
        rejected_tokens=tokens[:, 1],
    )


def _rows(dataset: TokenizedDataset, reference: Float64s, group: int) -> Float64s:
    first = int(dataset.first_sequence[group])
    return reference[first : first + int(dataset.sequences_per_group[group])]


def _pairs(dataset: TokenizedDataset, group: int) -> Float64s:
    """Numbers of the group's pairs within the data set; exact in float64."""
    return np.arange(dataset.group_pairs[group], dataset.group_pairs[group + 1], dtype=np.float64)
