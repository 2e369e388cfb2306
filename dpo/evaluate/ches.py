"""CHES: for which pairs the chosen completion's log-prob will fall, from one forward pass (arXiv 2410.08847).

A preference loss widens the gap between two log-probs, and lowering the rejected completion also lowers what
the model represents alike. With h_k the hidden state of the last layer that predicts token k, and S the sum
of h_k over a completion's tokens,

    CHES = <S_chosen, S_rejected> - |S_chosen|^2

and the length-normalised form takes means over tokens, M = S / length, in place of the sums. The higher it is
among pairs, the further the chosen log-prob falls.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo import distributed, terminal
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import Sizes, share
from dpo.data.records import num_trained
from dpo.data.trees import Layout, Tree, tree_batch
from dpo.evaluate.data_facts import pair_trees

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChesScores:
    """The scores of N pairs."""

    pairs: Int64s
    """(N,) numbers of the pairs in the data set, ascending."""
    scores: Float64s
    """(N,) CHES, in squared units of hidden states, larger for longer completions."""
    per_token: Float64s
    """(N,) the length-normalised form."""
    likeness: Float64s
    """(N,) <M_chosen, M_rejected> / |M_chosen|^2, without unit: 1 where the model represents both alike, 0
    where they have nothing in common; the length-normalised form is (likeness - 1) * |M_chosen|^2."""


def ches_of(sums: Float64s, num_tokens: Int64s) -> tuple[Float64s, Float64s, Float64s]:
    """CHES, its length-normalised form and the likeness of N pairs.

    Args:
        sums: (N, 2, D) summed hidden states of the chosen and the rejected completion.
        num_tokens: (N, 2) tokens of the completions.

    Returns:
        (N,) each, as in `ChesScores`.
    """

    def score(chosen: Float64s, rejected: Float64s) -> Float64s:
        return np.asarray(((rejected - chosen) * chosen).sum(axis=-1))

    means = sums / num_tokens[:, :, None]
    per_token = score(means[:, 0], means[:, 1])
    likeness = 1 + per_token / (means[:, 0] ** 2).sum(axis=-1)
    return score(sums[:, 0], sums[:, 1]), per_token, likeness


def sample_pairs(dataset: TokenizedDataset, number: int, seed: int = 0) -> Int64s:
    """The numbers of at most `number` random pairs, ascending; labels without rivals are none."""
    pairs = np.flatnonzero(dataset.has_rivals)
    drawn = np.random.default_rng(seed).choice(pairs, size=min(number, len(pairs)), replace=False)
    return np.sort(drawn)


def score_ches(
    scorer: Callable[..., Tensor], dataset: TokenizedDataset, pairs: Int64s, *, layout: Layout, budget: int
) -> ChesScores:
    """CHES of some pairs under a model, spread over the ranks. All ranks must call it.

    Args:
        scorer: From `frozen_scorer`: a batch and `states=True` -> (n, D) hidden states.
        dataset: Groups in token ids.
        pairs: (N,) numbers of pairs.
        layout: The batch layout that the model takes.
        budget: Most tokens of a batch, padding included.
    """
    trees = pair_trees(dataset, pairs)
    shares = share(_sizes(trees, layout), world_size=distributed.world_size(), budget=budget)
    mine: list[tuple[list[int], Float64s]] = []
    turns = terminal.progress(shares[distributed.rank()], description="CHES", unit="batches", leave=False)
    for positions in turns:
        batch = tree_batch([trees[position] for position in positions], layout).to(distributed.device())
        with torch.no_grad():  # an empty batch too: all ranks must call the model equally often
            states = scorer(batch, states=True).double()
        sums = states.new_zeros(len(batch.num_tokens), states.shape[1]).index_add(0, batch.sequences, states)
        if positions:
            mine.append((positions, sums.cpu().numpy().reshape(len(positions), 2, -1)))
    parts = [part for of_rank in distributed.gather_objects(mine) for part in of_rank]
    places = np.concatenate([np.asarray(positions) for positions, _ in parts])
    sums_of_all = np.concatenate([sums for _, sums in parts])[np.argsort(places)]
    lengths = np.array([[num_trained(part) for part in completions] for _, completions in trees])
    scores, per_token, likeness = ches_of(sums_of_all, lengths)
    return ChesScores(pairs=pairs, scores=scores, per_token=per_token, likeness=likeness)


def _sizes(trees: list[Tree], layout: Layout) -> Sizes:
    """Rows and tokens of each tree of two completions in a batch of this layout."""
    prompts = np.array([len(prompt) for prompt, _ in trees])
    completions = np.array([[len(part) for part in parts] for _, parts in trees])
    if layout == "rows":
        width = prompts + completions.max(axis=1)
        return Sizes(rows=np.full(len(trees), 2), width=width, padded=True)
    width = prompts + completions.sum(axis=1)
    return Sizes(rows=np.ones(len(trees), dtype=np.int64), width=width, padded=layout == "trees")
