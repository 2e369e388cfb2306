"""The plan's steps as this rank's micro-batches: one stream over the whole run, so that the next step's first
batch is built while this step computes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpo.data.plan import BatchPlan, Int64s, Sizes, Step, share
from dpo.data.trees import Layout, TreeBatch
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
    count: float
    """What the step's summed loss is divided by."""
    imbalance: float
    """Tokens of the fullest rank's part of the step over the mean, less 1."""

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
    rank: int,
    world_size: int,
) -> Iterator[MicroBatch]:
    """This rank's micro-batches of all steps from `first_step` on, in order.

    A thread may iterate over them: everything that belongs to a process or a thread is an argument.

    Args:
        objective: Builds batches.
        plan: The optimizer steps; used by nobody else meanwhile.
        first_step: From 1.
        layout: How the policy takes its batches.
        windows: How far back the policy's layers look; see `TreeBatch.to`.
        device: Where batches belong.
        budget: Most tokens of a micro-batch, padding included.
        rank: This rank.
        world_size: Number of ranks.
    """
    for number in range(first_step, plan.num_steps + 1):
        step = plan.step(number)
        sizes = objective.dataset.sizes(step.groups, layout)
        shares = share(sizes, world_size=world_size, budget=budget)
        count, imbalance = objective.count(step.groups), _imbalance(sizes, shares)
        for index, positions in enumerate(shares[rank]):
            groups = step.groups[positions]
            yield MicroBatch(
                step=step,
                index=index,
                of=len(shares[rank]),
                groups=groups,
                batch=objective.batch(groups, layout).to(device, windows),
                count=count,
                imbalance=imbalance,
            )


def _imbalance(sizes: Sizes, shares: list[list[list[int]]]) -> float:
    loads = [sizes.work[np.concatenate(own).astype(int)].sum() for own in shares]
    return float(np.max(loads) / np.mean(loads) - 1)
