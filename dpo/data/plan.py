"""The batch plan: which groups make each optimizer step, and how a step is cut for the ranks.

Two pure functions. `plan_steps` does not take the world size, so one GPU and sixty-four do the same steps
over the same pairs. `share` cuts one step: longest group first to the least loaded rank, then micro-batches
by token budget.
"""

import heapq
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from dpo.errors import UserError

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Rows and tokens that G groups take in a batch."""

    rows: Int64s
    """(G,) number of rows of each group."""
    width: Int64s
    """(G,) tokens of each group's longest row."""
    padded: bool
    """Whether the rows of a micro-batch are padded to its longest; otherwise there is no padding."""

    @property
    def work(self) -> Int64s:
        """(G,) tokens of each group, padding to its own longest row included."""
        return self.rows * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochPlan:
    """One pass over the data, as two arrays."""

    order: Int64s
    """(G,) group indices in training order."""
    offsets: Int64s
    """(num_steps + 1,) step i trains order[offsets[i] : offsets[i + 1]]."""


def plan_steps(pairs_per_group: Int64s, *, seed: int, epoch: int, pairs_per_step: int) -> EpochPlan:
    """Shuffles the groups and fills steps with whole groups, at most `pairs_per_step` pairs each.

    Args:
        pairs_per_group: (G,) number of pairs of each group, at least 1.
        seed: Decides the order of the data.
        epoch: Number of the pass, from 0; each pass has its own order.
        pairs_per_step: Most pairs of an optimizer step; the last step of an epoch may have far fewer.

    Raises:
        UserError: A group has more pairs than a step.
    """
    if len(pairs_per_group) and pairs_per_group.max() > pairs_per_step:
        raise UserError(
            f"train.pairs_per_step: {pairs_per_step}; group {int(pairs_per_group.argmax())} has "
            f"{int(pairs_per_group.max())} pairs, and groups are not split: raise it, or set "
            "data.group_pairs: false"
        )
    order = np.random.default_rng([seed, epoch]).permutation(len(pairs_per_group))
    ends = np.cumsum(pairs_per_group[order])
    offsets = [0]
    while offsets[-1] < len(order):
        start = int(ends[offsets[-1] - 1]) if offsets[-1] else 0
        offsets.append(int(np.searchsorted(ends, start + pairs_per_step, side="right")))
    return EpochPlan(order=order, offsets=np.asarray(offsets, dtype=np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimizer step."""

    number: int
    """From 1, over all epochs."""
    epoch: float
    """Passes over the data when this step is done."""
    groups: Int64s
    """Indices of the groups it trains."""


class BatchPlan:
    """All optimizer steps of a run: the plans of its epochs in order, one of them in memory at a time."""

    def __init__(
        self,
        pairs_per_group: Int64s,
        *,
        seed: int,
        num_epochs: int,
        pairs_per_step: int,
        max_steps: int | None,
    ) -> None:
        self._plan = partial(plan_steps, pairs_per_group, seed=seed, pairs_per_step=pairs_per_step)
        self._epoch, self._current = 0, self._plan(epoch=0)
        # The number of steps depends on an epoch's order only where groups differ in their number of pairs.
        alike = len(pairs_per_group) == 0 or bool((pairs_per_group == pairs_per_group[0]).all())
        counts = [len(self._current.offsets) - 1]
        for epoch in range(1, num_epochs):
            counts.append(counts[0] if alike else len(self._plan(epoch=epoch).offsets) - 1)
        self._ends = np.cumsum(counts)
        self.num_steps = int(self._ends[-1]) if max_steps is None else min(max_steps, int(self._ends[-1]))

    def step(self, number: int) -> Step:
        """The optimizer step with this number, from 1 to `num_steps`."""
        epoch = int(np.searchsorted(self._ends, number, side="left"))
        first = int(self._ends[epoch - 1]) if epoch else 0
        if epoch != self._epoch:
            self._epoch, self._current = epoch, self._plan(epoch=epoch)
        plan, index = self._current, number - first - 1
        groups = plan.order[plan.offsets[index] : plan.offsets[index + 1]]
        done = plan.offsets[index + 1] / len(plan.order)
        return Step(number=number, epoch=float(epoch + done), groups=groups)


def deal(work: Int64s, num_parts: int) -> list[list[int]]:
    """Distributes items over parts of about equal work: each item goes to the part with the least so far.

    Args:
        work: (W,) work of each item, in the order in which they are distributed; the largest first gives the
            most even parts.
        num_parts: Number of ranks, or of micro-batches.

    Returns:
        For each part the indices of its items, in the order in which they were added.
    """
    loads = [(0, part) for part in range(num_parts)]
    parts: list[list[int]] = [[] for _ in range(num_parts)]
    for index, amount in enumerate(work.tolist()):
        load, part = loads[0]
        parts[part].append(index)
        heapq.heapreplace(loads, (load + amount, part))
    return parts


def share(sizes: Sizes, *, world_size: int, budget: int) -> list[list[list[int]]]:
    """Cuts a step's groups for the ranks and into micro-batches.

    Longest group first, each to the least loaded rank. Every rank gets the same number of micro-batches, some
    of them empty where there are too few groups: ranks must make the same number of engine calls, or ZeRO-3
    deadlocks. A group larger than the budget is a micro-batch of its own.

    Args:
        sizes: Of the step's G groups.
        world_size: Number of ranks.
        budget: Most tokens of a micro-batch, padding included.

    Returns:
        For each rank a list of micro-batches, each a list of positions in 0..G-1.
    """
    work = sizes.work
    largest_first = np.lexsort((np.arange(len(work)), -work))
    of_ranks = [largest_first[part] for part in deal(work[largest_first], world_size)]
    if sizes.padded:
        shares = [_padded(positions, sizes, budget) for positions in of_ranks]
        most = max(map(len, shares))
        return [[*batches, *([[]] * (most - len(batches)))] for batches in shares]
    most = max(_num_packed(work[positions], budget) for positions in of_ranks)
    return [[positions[part].tolist() for part in deal(work[positions], most)] for positions in of_ranks]


def _num_packed(work: Int64s, budget: int) -> int:
    """How many micro-batches of about equal size hold these groups, given the largest first."""
    number = max(1, -(-int(work.sum()) // budget))
    while any(len(part) > 1 and work[part].sum() > budget for part in deal(work, number)):
        number += max(1, number // 64)
    return number


def _padded(positions: Int64s, sizes: Sizes, budget: int) -> list[list[int]]:
    """Micro-batches of groups of similar length, as many as the budget holds with all rows padded."""
    batches: list[list[int]] = []
    rows, width = 0, 0
    for position in sorted(positions.tolist(), key=lambda p: (-int(sizes.width[p]), p)):
        rows += int(sizes.rows[position])
        if batches and rows * width <= budget:
            batches[-1].append(position)
        else:
            batches.append([position])
            rows, width = int(sizes.rows[position]), int(sizes.width[position])
    return batches
