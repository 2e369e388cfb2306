"""The plan of a cache build: the missing sequences in trees, and the trees in batches.

Pure functions of the data and of what is missing. They never see the number of ranks, so that every sequence
is computed in the same batch, and gets the same bits, on one rank or on many.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import Int64s
from dpo.data.trees import Layout

SMALLER, ENOUGH = 4, 2048
"""How many times as many batches as fit the budget are cut, at most, for the ranks to share; and how many any
number of ranks shares evenly enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingPlan:
    """M missing sequences in K trees, and the trees in B batches, the largest tree first.

    The sequences of all data sets are numbered consecutively, one data set after the other.
    """

    order: Int64s
    """(M,) missing sequences, tree by tree."""
    trees: Int64s
    """(K + 1,) tree t holds the sequences order[trees[t] : trees[t + 1]]."""
    offsets: Int64s
    """(B + 1,) batch b holds the trees offsets[b] to offsets[b + 1]."""
    tokens: Int64s
    """(K,) tokens of each tree."""
    padded: bool
    """Whether the trees of a batch are padded to its largest."""

    @property
    def num_batches(self) -> int:
        """B."""
        return len(self.offsets) - 1

    @property
    def work(self) -> Int64s:
        """(B,) tokens of each batch, padding included."""
        if self.padded:
            return np.diff(self.offsets) * self.tokens[self.offsets[:-1]]
        return np.add.reduceat(self.tokens, self.offsets[:-1])

    def batch(self, number: int) -> list[list[int]]:
        """The sequences of each tree of a batch."""
        cuts = self.trees[self.offsets[number] : self.offsets[number + 1] + 1]
        return [self.order[start:end].tolist() for start, end in pairwise(cuts)]

    def num_tokens(self, number: int) -> int:
        """Tokens of a batch, without padding."""
        return int(self.tokens[self.offsets[number] : self.offsets[number + 1]].sum())


def plan_batches(
    datasets: Sequence[TokenizedDataset], sequences: Int64s, layout: Layout, budget: int
) -> MissingPlan:
    """Joins the missing sequences of each group into a tree, and cuts the trees into batches.

    Args:
        datasets: The data sets that the sequences are in.
        sequences: (M,) missing sequences, at least one. Their order decides between trees of equal size.
        layout: How batches are laid out; with `rows` every sequence is a tree of its own.
        budget: Largest number of tokens in a batch, padding included; a larger tree is a batch of its own.
    """
    completion = np.concatenate([dataset.completion_tokens for dataset in datasets])[sequences]
    prompt = np.concatenate([dataset.sequence_tokens for dataset in datasets])[sequences] - completion
    groups = np.arange(len(sequences)) if layout == "rows" else _groups_of(datasets, sequences)
    # `first` is the place of each tree's first sequence, `tree_of` the tree of each sequence.
    _, first, tree_of, sizes = np.unique(groups, return_index=True, return_inverse=True, return_counts=True)
    tokens = prompt[first] + np.bincount(tree_of, weights=completion).astype(np.int64)
    largest_first = np.lexsort((first, -tokens))
    rank_of = np.argsort(largest_first)  # the inverse: the place of each tree in that order
    tokens, padded = tokens[largest_first], layout in ("trees", "rows")
    return MissingPlan(
        order=sequences[np.argsort(rank_of[tree_of], kind="stable")],
        trees=np.concatenate([[0], np.cumsum(sizes[largest_first])]),
        offsets=batch_offsets(tokens, even_budget(tokens, budget, padded=padded), padded=padded),
        tokens=tokens,
        padded=padded,
    )


def even_budget(tokens: Int64s, budget: int, *, padded: bool) -> int:
    """A smaller budget, with which 2, 4, 8 or more ranks can share the batches evenly, whatever their number.

    The number of batches becomes a multiple of a power of two, by cutting batches of about a quarter of the
    budget or more: three become eight, 65 become 128.

    Args:
        tokens: (K,) tokens of each tree, in descending order.
        budget: Most tokens of a batch, padding included.
        padded: As in `batch_offsets`.

    Returns:
        The smallest budget that gives no more batches than that; `budget` where it gives `ENOUGH`.
    """

    def batches(tokens_each: int) -> int:
        return len(batch_offsets(tokens, tokens_each, padded=padded)) - 1

    fewest = batches(budget)
    if fewest >= ENOUGH:
        return budget
    multiples = (-(-fewest // power) * power for power in (64, 32, 16, 8, 4))
    number = next(multiple for multiple in multiples if multiple <= SMALLER * fewest)
    return bisect_left(range(budget), -number, lo=1, key=lambda tokens_each: -batches(tokens_each))


def batch_offsets(tokens: Int64s, budget: int, *, padded: bool) -> Int64s:
    """Cuts trees into batches of at most `budget` tokens, with at least one tree per batch.

    Args:
        tokens: (K,) tokens of each tree, in descending order: the first tree of a batch is the widest.
        budget: Tokens per batch.
        padded: Count every tree of a batch as wide as its first one.

    Returns:
        (B + 1,) the tree at which each batch starts, and K.
    """
    ends = np.cumsum(tokens)
    offsets = [0]
    while (start := offsets[-1]) < len(tokens):
        if padded:
            fitting = budget // int(tokens[start])
        else:
            limit = int(ends[start] - tokens[start]) + budget
            fitting = int(np.searchsorted(ends, limit, side="right")) - start
        offsets.append(min(start + max(1, fitting), len(tokens)))
    return np.asarray(offsets, dtype=np.int64)


def place_of(datasets: Sequence[TokenizedDataset], sequence: int) -> tuple[int, int]:
    """(data set, sequence in it) of a sequence that is numbered over all data sets."""
    for number, dataset in enumerate(datasets):
        if sequence < len(dataset.keys):
            return number, sequence
        sequence -= len(dataset.keys)
    raise IndexError(sequence)


def _groups_of(datasets: Sequence[TokenizedDataset], sequences: Int64s) -> Int64s:
    """(M,) the group of each sequence, numbered consecutively over all data sets."""
    ends = np.cumsum(np.concatenate([dataset.sequences_per_group for dataset in datasets]))
    return np.searchsorted(ends, sequences, side="right")
