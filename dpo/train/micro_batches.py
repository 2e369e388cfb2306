"""The plan's steps as this rank's micro-batches: one stream over the whole run, so that the next step's first
batch is built while this step computes.

In a step with a cached gradient a micro-batch is a piece: a group that is larger than the budget is cut into
several, each with its prompt and some of its completions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpo.data.plan import BatchPlan, Int64s, Sizes, Step, share
from dpo.data.records import TokenIds
from dpo.data.trees import Layout, Tree, TreeBatch, tree_batch
from dpo.train.session import Objective


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward and backward pass of this rank."""

    step: Step
    index: int
    """Within this rank's part of the step, from 0."""
    of: int
    """Micro-batches in this rank's part; equal on all ranks."""
    groups: Int64s
    """Its groups; none where a rank has run out of work."""
    batch: TreeBatch
    whole: TreeBatch | None
    """With a cached gradient: this rank's part of the step in one batch, its pieces' sequences in order."""
    count: float
    """What the step's summed loss is divided by."""
    imbalance: float
    """Tokens of the fullest rank's part of the step over the mean, minus 1."""

    @property
    def last(self) -> bool:
        """Whether the update follows."""
        return self.index == self.of - 1


def micro_batches(
    objective: Objective,
    plan: BatchPlan,
    *,
    first_step: int,
    layout: Layout,
    windows: Sequence[int | None] = (),
    device: torch.device,
    budget: int,
    cached: bool,
    rank: int,
    world_size: int,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of all steps from `first_step` on, in order.

    A thread may iterate over them: everything that belongs to a process or a thread is an argument.

    Args:
        objective: Builds batches.
        plan: The optimizer steps; used by nothing else meanwhile.
        first_step: From 1.
        layout: The batch layout that the policy takes.
        windows: How far back the policy's layers look; see `TreeBatch.to`.
        device: The batches' device.
        budget: Most tokens of a micro-batch, padding included.
        cached: Cut groups that are larger than the budget.
        rank: This rank.
        world_size: Number of ranks.
    """
    for number in range(first_step, plan.num_steps + 1):
        step = plan.step(number)
        sizes = objective.dataset.sizes(step.groups, layout)
        shares = share(sizes, world_size=world_size, budget=budget)
        by_rank = [[step.groups[positions] for positions in part] for part in shares]
        if cached:
            whole = objective.batch(np.concatenate(by_rank[rank]), layout).to(device)
            pieces = _pieces(objective, by_rank, rank, layout, budget)
        else:
            whole = None
            pieces = [(groups, []) for groups in by_rank[rank]]
        for index, (groups, trees) in enumerate(pieces):
            batch = objective.batch(groups, layout) if whole is None else tree_batch(trees, layout)
            yield MicroBatch(
                step=step,
                index=index,
                of=len(pieces),
                groups=groups,
                batch=batch.to(device, windows),
                whole=whole,
                count=objective.count(step.groups),
                imbalance=_imbalance(sizes, shares),
            )


Piece = tuple[Int64s, list[Tree]]
"""The groups that a piece is of, and its trees; none where a rank waits for the others."""


def _pieces(
    objective: Objective, by_rank: list[list[Int64s]], rank: int, layout: Layout, budget: int
) -> list[Piece]:
    """A rank's pieces, as many as every other rank has: all ranks must call the engine equally often."""
    pieces: list[list[Piece]] = [
        [(groups, part) for groups in own for part in cut(objective.trees(groups), layout, budget)]
        for own in by_rank
    ]
    missing = max(map(len, pieces)) - len(pieces[rank])
    return pieces[rank] + [(by_rank[rank][0][:0], [])] * missing


def cut(trees: list[Tree], layout: Layout, budget: int) -> list[list[Tree]]:
    """Trees as pieces within the budget: all of them as one, or a single tree that is too large as several.

    Args:
        trees: Of a micro-batch: several that fit the budget together, or one of any size, or none.
        layout: The batch layout.
        budget: Most tokens of a piece, padding included; a single completion may exceed it.

    Returns:
        The pieces; their completions are those of the trees, in order.
    """
    if len(trees) != 1:
        return [trees]
    ((prompt, completions),) = trees
    pieces: list[list[TokenIds]] = [[]]
    for completion in completions:
        if pieces[-1] and _tokens(prompt, [*pieces[-1], completion], layout) > budget:
            pieces.append([])
        pieces[-1].append(completion)
    return [[(prompt, part)] for part in pieces]


def _tokens(prompt: TokenIds, completions: list[TokenIds], layout: Layout) -> int:
    """Tokens that a tree takes in a batch of its own."""
    lengths = [len(completion) for completion in completions]
    if layout == "rows":
        return len(lengths) * (len(prompt) + max(lengths))
    return len(prompt) + sum(lengths)


def _imbalance(sizes: Sizes, shares: list[list[list[int]]]) -> float:
    loads = [sizes.work[np.concatenate(own).astype(int)].sum() for own in shares]
    return float(np.max(loads) / np.mean(loads) - 1)
