"""The batch plan by hand and by property: whole groups, each once, within the limits, for any world size."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.plan import BatchPlan, Sizes, plan_steps, share
from dpo.errors import UserError

PAIRS = st.lists(st.integers(1, 6), min_size=1, max_size=60)
GROUPS = st.lists(st.tuples(st.integers(2, 5), st.integers(2, 50)), min_size=1, max_size=40)


def as_array(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


@given(PAIRS, st.integers(6, 20), st.integers(0, 3), st.integers(0, 3))
def test_an_epoch_takes_every_group_once_in_steps_of_whole_groups(
    pairs: list[int], pairs_per_step: int, seed: int, epoch: int
) -> None:
    plan = plan_steps(as_array(pairs), seed=seed, epoch=epoch, pairs_per_step=pairs_per_step)
    assert sorted(plan.order.tolist()) == list(range(len(pairs)))
    assert (plan.offsets[0], plan.offsets[-1]) == (0, len(pairs))
    steps = [[pairs[group] for group in plan.order[a:b]] for a, b in pairwise(plan.offsets)]
    assert all(0 < sum(step) <= pairs_per_step for step in steps)
    # A step ends only where the next group would not fit.
    assert all(sum(step) + after[0] > pairs_per_step for step, after in pairwise(steps))


def test_plain_pairs_fill_every_step_but_the_last() -> None:
    plan = plan_steps(as_array([1] * 10), seed=0, epoch=0, pairs_per_step=4)
    assert plan.offsets.tolist() == [0, 4, 8, 10]


def test_the_order_depends_only_on_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, pairs_per_step: int = 8) -> list[int]:
        plan = plan_steps(as_array([1] * 50), seed=seed, epoch=epoch, pairs_per_step=pairs_per_step)
        return plan.order.tolist()

    assert order(0, 0) == order(0, 0, pairs_per_step=16)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert order(0, 0) != sorted(order(0, 0))


def test_a_group_with_more_pairs_than_a_step_is_refused_by_its_number() -> None:
    with pytest.raises(UserError, match=r"train\.pairs_per_step: 4; group 1 has 5 pairs"):
        plan_steps(as_array([1, 5, 2]), seed=0, epoch=0, pairs_per_step=4)


def batch_plan(num_groups: int, *, num_epochs: int, max_steps: int | None = None) -> BatchPlan:
    pairs = as_array([1] * num_groups)
    return BatchPlan(pairs, seed=0, num_epochs=num_epochs, pairs_per_step=4, max_steps=max_steps)


def test_steps_are_numbered_over_all_epochs() -> None:
    plan = batch_plan(10, num_epochs=2)  # 4 + 4 + 2 groups per epoch
    steps = [plan.step(number) for number in range(1, plan.num_steps + 1)]
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    assert [len(step.groups) for step in steps] == [4, 4, 2, 4, 4, 2]
    assert [step.epoch for step in steps] == pytest.approx([0.4, 0.8, 1.0, 1.4, 1.8, 2.0])
    for epoch in (steps[:3], steps[3:]):
        assert sorted(np.concatenate([step.groups for step in epoch])) == list(range(10))
    assert steps[0].groups.tolist() != steps[3].groups.tolist()


def test_max_steps_stops_early_and_changes_no_step() -> None:
    long, short = batch_plan(10, num_epochs=2), batch_plan(10, num_epochs=2, max_steps=4)
    assert (long.num_steps, short.num_steps) == (6, 4)
    assert batch_plan(10, num_epochs=1, max_steps=100).num_steps == 3
    for number in range(1, 5):
        assert short.step(number).groups.tolist() == long.step(number).groups.tolist()


def micro_batches(
    groups: list[tuple[int, int]], world_size: int, budget: int, *, padded: bool = True
) -> list[list[list[int]]]:
    rows, width = zip(*groups, strict=True)
    sizes = Sizes(rows=as_array([*rows]), width=as_array([*width]), padded=padded)
    return share(sizes, world_size=world_size, budget=budget)


@given(GROUPS, st.integers(1, 8), st.integers(2, 400), st.booleans())
def test_a_share_holds_every_group_once_within_the_budget(
    groups: list[tuple[int, int]], world_size: int, budget: int, padded: bool
) -> None:
    shares = micro_batches(groups, world_size, budget, padded=padded)
    assert len(shares) == world_size
    assert len({len(batches) for batches in shares}) == 1  # all ranks make the same number of engine calls
    batches = [batch for batches in shares for batch in batches]
    assert sorted(position for batch in batches for position in batch) == list(range(len(groups)))
    for batch in batches:
        rows, width = sum(groups[p][0] for p in batch), max((groups[p][1] for p in batch), default=0)
        size = rows * width if padded else sum(groups[p][0] * groups[p][1] for p in batch)
        assert size <= budget or len(batch) == 1


@given(GROUPS, st.integers(1, 8), st.booleans())
def test_no_rank_has_more_work_than_another_by_more_than_one_group(
    groups: list[tuple[int, int]], world_size: int, padded: bool
) -> None:
    work = [sequences * longest for sequences, longest in groups]
    shares = micro_batches(groups, world_size, 100, padded=padded)
    loads = [sum(work[position] for batch in batches for position in batch) for batches in shares]
    assert max(loads) - min(loads) <= max(work)


def test_a_share_by_hand() -> None:
    # Work 2 x 10 = 20, 2 x 8 = 16, 3 x 4 = 12, 2 x 3 = 6. Longest first to the least loaded of two ranks:
    # 20 to rank 0, 16 to rank 1, 12 to rank 1 (16 < 20), 6 to rank 0 (20 < 28).
    # Rank 0 pads 2 + 2 rows to 10, which is 40; rank 1 pads 2 + 3 rows to 8, which is 40 too.
    groups = [(3, 4), (2, 10), (2, 3), (2, 8)]
    assert micro_batches(groups, 2, 39) == [[[1], [2]], [[3], [0]]]
    assert micro_batches(groups, 2, 40) == [[[1, 2]], [[3, 0]]]


def test_without_padding_micro_batches_are_of_equal_size() -> None:
    # 10, 8, 5, 4, 3 on one rank: 30 tokens need two of 16; the largest first, each to the smaller one:
    # 10 | 8 | 8 + 5 | 10 + 4 | 13 + 3.
    groups = [(1, 4), (1, 10), (1, 3), (1, 8), (1, 5)]
    assert micro_batches(groups, 1, 16, padded=False) == [[[1, 0], [3, 4, 2]]]
    assert micro_batches(groups, 1, 15, padded=False) == [[[1], [3, 2], [4, 0]]]
    # On two ranks those are their shares; the second rank's 16 do not fit 15, so both make two calls.
    assert micro_batches(groups, 2, 15, padded=False) == [[[1], [0]], [[3], [4, 2]]]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_slowest_rank_is_close_to_the_mean_with_four_groups_and_more(world_size: int) -> None:
    # Lengths as in Anthropic HH: log-normal, 190 tokens on average. Mean over 200 steps.
    lengths = np.random.default_rng(0).lognormal(5.1, 0.6, 100_000).astype(np.int64) + 2
    excess = []
    for start in range(0, 200 * world_size * 8, world_size * 8):
        width = lengths[start : start + world_size * 8]
        sizes = Sizes(rows=np.ones_like(width), width=width, padded=False)
        shares = share(sizes, world_size=world_size, budget=4096)
        loads = [sum(int(width[p]) for batch in batches for p in batch) for batches in shares]
        excess.append(max(loads) / np.mean(loads) - 1)
    assert np.mean(excess) < 0.05


def test_a_rank_without_work_has_empty_micro_batches() -> None:
    assert micro_batches([(2, 10), (2, 9), (2, 1)], 4, 20) == [[[0]], [[1]], [[2]], [[]]]
    assert micro_batches([(2, 9), (2, 5), (2, 5)], 2, 18) == [[[0], []], [[1], [2]]]


@given(GROUPS, st.integers(2, 8), st.integers(2, 400))
@settings(max_examples=50)
def test_all_ranks_together_train_what_one_does(
    groups: list[tuple[int, int]], world_size: int, budget: int
) -> None:
    def trained(world: int) -> list[int]:
        return sorted(
            p for batches in micro_batches(groups, world, budget) for batch in batches for p in batch
        )

    assert trained(world_size) == trained(1)
