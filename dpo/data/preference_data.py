"""A data set with what a preference loss reads besides: reference log-probs, and weights of pairs.

The training loop asks it for the batch of each micro-batch and for what the step's mean is divided by.
"""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import Int64s
from dpo.data.trees import Layout, TreeBatch, group_batch

Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceData:
    """A data set of S sequences, N completion tokens and P pairs, with their values."""

    dataset: TokenizedDataset
    reference: npt.NDArray[np.float64] | npt.NDArray[np.float32] | None
    """(S,) reference log-probs of the sequences in nats, or (N,) of the completion tokens; None for losses
    that need none."""
    weights: Float64s
    """(P,) weight of each pair in the loss."""
    units: Float64s
    """(P,) what each pair adds to the denominator of a mean: its weight, or its share of its group."""
    mismatched: bool = False
    """Whether the last completion of each group is of another prompt; see `dpo.data.mismatched`."""
    with_quantiles: bool = False
    """Whether the loss reads the quantiles of the completions' scores."""

    def count(self, groups: Int64s) -> float:
        """The denominator of the mean loss over these groups."""
        return float(self._of_pairs(self.units, groups).sum())

    def batch(self, groups: Int64s, layout: Layout) -> TreeBatch:
        """The batch of these groups, with reference values of all completions and weights of all pairs."""
        batch = group_batch([self.dataset[int(group)] for group in groups], layout)
        weights = torch.from_numpy(self._of_pairs(self.weights, groups))
        batch = replace(batch, pair_weights=weights, loss_count=self.count(groups))
        if self.mismatched:
            last = np.cumsum(self.dataset.sequences_per_group[groups]) - 1
            batch = replace(batch, mismatched=torch.from_numpy(last))
        if self.with_quantiles:
            shares = self.dataset.values_of(self.dataset.quantiles, groups)
            batch = replace(batch, quantiles=torch.from_numpy(shares))
        if self.reference is None:
            return batch
        return replace(batch, reference=torch.from_numpy(self.dataset.values_of(self.reference, groups)))

    def _of_pairs(self, values: Float64s, groups: Int64s) -> Float64s:
        first, end = self.dataset.group_pairs[groups], self.dataset.group_pairs[np.asarray(groups) + 1]
        parts = [values[start:stop] for start, stop in zip(first, end, strict=True)]
        return np.concatenate(parts) if parts else np.zeros(0)


def preference_data(
    dataset: TokenizedDataset,
    reference: npt.NDArray[np.float64] | npt.NDArray[np.float32] | None,
    *,
    by_margin: bool = False,
    over_groups: bool = False,
    mismatched: bool = False,
    with_quantiles: bool = False,
) -> PreferenceData:
    """Combines a data set with reference values and pair weights.

    Args:
        dataset: Tokenized groups.
        reference: As in `PreferenceData`.
        by_margin: Weight each pair by its score margin.
        over_groups: Means are over groups: the pairs of a group together count as one.
        mismatched: The data set is one of `dpo.data.mismatched`.
        with_quantiles: The loss reads the quantiles of the completions' scores.

    Raises:
        ValueError: `by_margin` or `with_quantiles`, and the data has pairs without scores.
    """
    ones = np.ones(len(dataset.pairs))
    weights = np.asarray(dataset.margins, dtype=np.float64) if by_margin else ones
    if not np.isfinite(weights).all() or (with_quantiles and not np.isfinite(dataset.margins).all()):
        raise ValueError("pairs without scores")
    units = np.repeat(1 / dataset.pairs_per_group, dataset.pairs_per_group) if over_groups else weights
    return PreferenceData(
        dataset=dataset,
        reference=reference,
        weights=weights,
        units=units,
        mismatched=mismatched,
        with_quantiles=with_quantiles,
    )
