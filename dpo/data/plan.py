"""The batch plan: which groups make each optimizer step, and how a step is cut for the ranks.

Two pure functions. `plan_steps` never sees the world size, so one GPU and sixty-four walk the same steps over
the same pairs; `share` cuts one step: longest group first to the least loaded rank, then micro-batches by
token budget.
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
    """What G groups take in a batch."""

    rows: Int64s
    """(G,) rows of each group."""
    width: Int64s
    """(G,) tokens of its longest row."""
    padded: bool
    """Whether all rows of a micro-batch are as wide as its widest; otherwise nothing is."""

    @property
    def work(self) -> Int64s:
        """(G,) tokens of each group, its own padding included."""
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
        seed: Order of the data.
        epoch: Number of the pass, from 0; each has its own order.
        pairs_per_step: Pairs of an optimizer step. The last step of an epoch may have fewer.

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
    """All optimizer steps of a run: the epochs' plans one after the other, one of them in memory."""

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
        # How many steps an epoch has depends on its order only where groups differ in their pairs.
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


def deal(work: Int64s, num_hands: int) -> list[list[int]]:
    """Deals pieces so that the hands are equally full: each goes to the hand with the least work so far.

    Args:
        work: (B,) of each piece, in the order of dealing; the largest first gives the fairest hands.
        num_hands: Ranks, or micro-batches.

    Returns:
        For each hand the numbers of its pieces, in the order of dealing.
    """
    loads = [(0, hand) for hand in range(num_hands)]
    hands: list[list[int]] = [[] for _ in range(num_hands)]
    for number, amount in enumerate(work.tolist()):
        load, hand = loads[0]
        hands[hand].append(number)
        heapq.heapreplace(loads, (load + amount, hand))
    return hands


def share(sizes: Sizes, *, world_size: int, budget: int) -> list[list[list[int]]]:
    """Cuts a step's groups for the ranks and into micro-batches.

    The longest group goes first to the least loaded rank. Every rank gets the same number of micro-batches,
    some of them empty where there are too few groups: ranks must make the same number of engine calls or
    ZeRO-3 deadlocks. A group larger than the budget is a micro-batch of its own.

    Args:
        sizes: Of the G groups.
        world_size: Number of ranks.
        budget: Most tokens of a micro-batch, padding included.

    Returns:
        For each rank a list of micro-batches, each a list of positions in 0..G-1.
    """
    work = sizes.work
    largest_first = np.lexsort((np.arange(len(work)), -work))
    mine = [largest_first[hand] for hand in deal(work[largest_first], world_size)]
    if sizes.padded:
        shares = [_padded(positions, sizes, budget) for positions in mine]
        most = max(map(len, shares))
        return [[*batches, *([[]] * (most - len(batches)))] for batches in shares]
    most = max(_num_packed(work[positions], budget) for positions in mine)
    return [[positions[hand].tolist() for hand in deal(work[positions], most)] for positions in mine]


def _num_packed(work: Int64s, budget: int) -> int:
    """How many equally full micro-batches hold these groups, the largest first."""
    number = max(1, -(-int(work.sum()) // budget))
    while any(len(hand) > 1 and work[hand].sum() > budget for hand in deal(work, number)):
        number += max(1, number // 64)
    return number


def _padded(positions: Int64s, sizes: Sizes, budget: int) -> list[list[int]]:
    """Groups of similar length together, as many as the budget holds when all rows are padded to the
    longest.
    """
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
