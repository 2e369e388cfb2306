"""Held-out loss, rewards and accuracy of a policy: one value per pair, against the cached reference.

Each pair is scored once, by one rank, and every rank then holds all values: means and intervals are over the
whole set, whatever the number of ranks or the batch size (law 7).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo import alive, distributed
from dpo.config import LossConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import share
from dpo.data.preference_data import PreferenceData
from dpo.data.prefetch import prefetch
from dpo.data.trees import Layout, TreeBatch
from dpo.evaluate.data_facts import pair_tokens
from dpo.loss.accuracy import accuracies, label_accuracies
from dpo.loss.catalog import compares_pairs, needs_aligned
from dpo.loss.pairs import PairLogProbs, aligned_pair_logps, pair_logps
from dpo.loss.preference_loss import preference_loss

Float64s = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Records = npt.NDArray[np.void]

_MEASURED = (
    "losses",
    "chosen_rewards",
    "rejected_rewards",
    "correct",
    "chosen_logps",
    "rejected_logps",
    "chosen_reference",
    "rejected_reference",
)
_RECORD = np.dtype([("pair", np.int64), *((name, np.float64) for name in _MEASURED)])
"""The values of one pair; `pair` is its position in the data set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairScores:
    """One value for each of P pairs, in the order of the data set.

    A completion with a label instead of a rival is a pair with one side; the other has 0 nats and 0 tokens.
    """

    groups: npt.NDArray[np.int64]
    """(P,) the pair's group: pairs of one prompt are not independent."""
    losses: Float64s
    """(P,) losses, times the pairs' weights."""
    units: Float64s
    """(P,) what each pair adds to the denominator of the mean loss; 1 where nothing is weighted."""
    chosen_rewards: Float64s
    """(P,) beta * log(policy / reference) of the chosen completion."""
    rejected_rewards: Float64s
    correct: Float64s
    """(P,) 1 where the chosen completion has the higher reward, 0 for the lower one, 0.5 for a tie. With a
    label: 1 where the reward lies on the label's side of `midpoint`."""
    chosen_logps: Float64s
    """(P,) summed log-prob under the policy, in nats."""
    rejected_logps: Float64s
    reference_logps: Float64s
    """(P, 2) summed log-probs of chosen and rejected under the reference, in nats; NaN if the loss needs no
    reference."""
    chosen_tokens: npt.NDArray[np.int64]
    """(P,) tokens of the chosen completion."""
    rejected_tokens: npt.NDArray[np.int64]
    mismatched: tuple[Float64s, Float64s] | None = None
    """(M,) log-probs of completions of other prompts, of policy and reference; None where none are needed."""

    @property
    def has_chosen(self) -> Bools:
        """(P,) whether the pair has a chosen, or desirable, completion."""
        return self.chosen_tokens > 0

    @property
    def has_rejected(self) -> Bools:
        """(P,) whether the pair has a rejected, or undesirable, completion."""
        return self.rejected_tokens > 0

    @property
    def has_rivals(self) -> Bools:
        """(P,) whether the pair has both."""
        return self.has_chosen & self.has_rejected

    @property
    def midpoint(self) -> float:
        """The reward halfway between the mean reward of chosen and that of rejected completions."""
        means = self.chosen_rewards[self.has_chosen].mean(), self.rejected_rewards[self.has_rejected].mean()
        return float(sum(means)) / 2

    @property
    def margins(self) -> Float64s:
        """(P,) chosen minus rejected reward.

        Of a completion with a label, twice its distance from `midpoint`, positive on its label's side.
        """
        margins = self.chosen_rewards - self.rejected_rewards
        if self.has_rivals.all():
            return margins
        middle = self.midpoint
        above = np.where(self.has_chosen, self.chosen_rewards - middle, middle - self.rejected_rewards)
        return np.where(self.has_rivals, margins, 2 * above)

    def counts(self) -> dict[str, float]:
        """How much the means are over: pairs, and prompts."""
        prompts = np.unique(self.groups)
        return {"eval/num_pairs": float(len(self.groups)), "eval/num_prompts": float(len(prompts))}

    def means(self) -> dict[str, float]:
        """The metrics under the names that training logs."""
        return {
            "eval/loss": float(self.losses.sum() / self.units.sum()),
            "eval/rewards/chosen": float(self.chosen_rewards[self.has_chosen].mean()),
            "eval/rewards/rejected": float(self.rejected_rewards[self.has_rejected].mean()),
            "eval/rewards/margins": float(self.margins.mean()),
            "eval/rewards/accuracies": float(self.correct.mean()),
            "eval/logps/chosen": float(self.chosen_logps[self.has_chosen].mean()),
            "eval/logps/rejected": float(self.rejected_logps[self.has_rejected].mean()),
        }


def score_pairs(
    score: Callable[..., Tensor],
    data: PreferenceData,
    loss: LossConfig,
    *,
    dtype: str,
    layout: Layout,
    budget: int,
    device: torch.device,
) -> PairScores:
    """Scores every pair of a data set, spread over the ranks. All ranks must call it.

    Args:
        score: The policy: a batch of S sequences on `device` -> (S,) log-probs in nats, or one per token with
            `per_token`, or (S, 2) with `aligned`; see `SequenceScorer.forward`.
        data: Held-out groups and their reference log-probs.
        loss: The training loss.
        dtype: The policy's compute type, which says how far log-probs are rounded.
        layout: The batch layout that the policy takes.
        budget: Most tokens of a batch, padding included.
        device: The batches' device.
    """
    sizes = data.dataset.sizes(np.arange(len(data.dataset)), layout)
    shares = share(sizes, world_size=distributed.world_size(), budget=budget)
    mine = shares[distributed.rank()]

    def batch_of(groups: list[int]) -> TreeBatch:
        return data.batch(np.asarray(groups, dtype=np.int64), layout).to(device)

    records, others = [np.empty(0, _RECORD)], [np.empty((0, 2))]
    for groups, batch in zip(mine, prefetch(map(batch_of, mine)), strict=True):
        alive.step("held-out pairs")
        with torch.no_grad():  # an empty batch too: all ranks must call the model equally often
            options = {"aligned": True} if needs_aligned(loss) else {"per_token": loss.ld_alpha is not None}
            logps = score(batch, **options)
        if groups:
            records.append(_records(_pairs_of(data.dataset, groups), batch, logps, loss, dtype))
            others.append(_mismatched(batch, logps))
    everything = np.concatenate(distributed.gather_objects(np.concatenate(records)))
    scores = _in_order(everything, data, loss, dtype)
    if data.mismatched:
        both = np.concatenate(distributed.gather_objects(np.concatenate(others)))
        scores = replace(scores, mismatched=(both[:, 0], both[:, 1]))
    if not compares_pairs(loss):
        return scores
    return replace(scores, losses=data.weights * _losses_together(scores, loss))


def _records(
    pairs: npt.NDArray[np.int64], batch: TreeBatch, logps: Tensor, loss: LossConfig, dtype: str
) -> Records:
    """(B,) records of a batch's pairs.

    Args:
        pairs: (B,) positions of the batch's pairs in the data set.
        batch: With the weights of its pairs.
        logps: (S,) of the policy, or one per token with `loss.ld_alpha`.
        loss: The training loss.
        dtype: Compute type of the policy.
    """
    named = (batch.pairs, batch.num_tokens, loss.ld_alpha, batch.mismatched, batch.quantiles)
    policy = aligned_pair_logps(logps, *named) if needs_aligned(loss) else pair_logps(logps, *named)
    reference = pair_logps(batch.reference, *named) if batch.reference is not None else None
    result = preference_loss(policy, reference, loss)
    assert batch.pair_weights is not None
    unknown = torch.full_like(policy.chosen, torch.nan)
    measured = {
        "losses": batch.pair_weights * result.losses,
        "chosen_rewards": result.chosen_rewards,
        "rejected_rewards": result.rejected_rewards,
        "correct": accuracies(result, policy, loss, dtype),
        "chosen_logps": policy.chosen,
        "rejected_logps": policy.rejected,
        "chosen_reference": reference.chosen if reference else unknown,
        "rejected_reference": reference.rejected if reference else unknown,
    }
    records = np.empty(len(pairs), _RECORD)
    records["pair"] = pairs
    for name, values in measured.items():
        records[name] = values.double().cpu().numpy()
    return records


def _mismatched(batch: TreeBatch, logps: Tensor) -> Float64s:
    """(M, 2) log-probs of a batch's mismatched completions under policy and reference."""
    if batch.mismatched is None or batch.reference is None:
        return np.empty((0, 2))
    both = torch.stack([logps[batch.mismatched].double(), batch.reference[batch.mismatched].double()], dim=1)
    return np.asarray(both.cpu().numpy())


def _in_order(records: Records, data: PreferenceData, loss: LossConfig, dtype: str) -> PairScores:
    """The records of all ranks as columns in the order of the data set, beside what the data set knows."""
    dataset = data.dataset
    records = records[np.argsort(records["pair"], kind="stable")]
    column = {name: np.ascontiguousarray(records[name]) for name in _MEASURED}
    tokens = pair_tokens(dataset)
    scores = PairScores(
        groups=np.repeat(np.arange(len(dataset)), dataset.pairs_per_group),
        losses=column["losses"],
        units=data.units,
        chosen_rewards=column["chosen_rewards"],
        rejected_rewards=column["rejected_rewards"],
        correct=column["correct"],
        chosen_logps=column["chosen_logps"],
        rejected_logps=column["rejected_logps"],
        reference_logps=np.stack([column["chosen_reference"], column["rejected_reference"]], axis=1),
        chosen_tokens=tokens[:, 0],
        rejected_tokens=tokens[:, 1],
    )
    if dataset.has_rivals.all():
        return scores
    labelled = label_accuracies(scores.margins / 2, tokens.max(axis=1), loss, dtype)
    return replace(scores, correct=np.where(dataset.has_rivals, scores.correct, labelled))


def _losses_together(scores: PairScores, loss: LossConfig) -> Float64s:
    """(P,) losses of a loss that depends on all pairs together: of the data set, instead of a batch."""

    def pairs(chosen: Float64s, rejected: Float64s, mismatched: Float64s | None) -> PairLogProbs:
        values = (chosen, rejected, scores.chosen_tokens, scores.rejected_tokens)
        tensors = [torch.from_numpy(np.ascontiguousarray(value)) for value in values]
        return PairLogProbs(
            chosen=tensors[0],
            rejected=tensors[1],
            chosen_tokens=tensors[2],
            rejected_tokens=tensors[3],
            mismatched=None if mismatched is None else torch.from_numpy(mismatched.copy()),
        )

    others = scores.mismatched or (None, None)
    policy = pairs(scores.chosen_logps, scores.rejected_logps, others[0])
    reference = pairs(scores.reference_logps[:, 0], scores.reference_logps[:, 1], others[1])
    return np.asarray(preference_loss(policy, reference, loss).losses.numpy())


def _pairs_of(dataset: TokenizedDataset, groups: list[int]) -> npt.NDArray[np.int64]:
    """Positions in the data set of the pairs of these groups, in the order of a batch."""
    return np.concatenate(
        [np.arange(dataset.group_pairs[group], dataset.group_pairs[group + 1]) for group in groups]
    )
