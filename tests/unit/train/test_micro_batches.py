"""This rank's micro-batches: all steps in one stream, so that the next step's first one is built in time."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo.config import Config, LossConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import BatchPlan, Int64s
from dpo.data.preference_data import preference_data
from dpo.data.prefetch import prefetch
from dpo.data.records import TokenIds
from dpo.data.trees import Layout, TreeBatch, tree_batch
from dpo.train.micro_batches import MicroBatch, cut, micro_batches
from dpo.train.preference_objective import PreferenceObjective


@pytest.fixture
def objective(
    make_config: Callable[..., Config],
    open_data: Callable[[Config], TokenizedDataset],
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., list[dict[str, Any]]],
) -> PreferenceObjective:
    data = open_data(make_config(write_jsonl(preference_rows(12))))
    return PreferenceObjective(data=preference_data(data, np.zeros(len(data.keys))), loss_config=LossConfig())


def plan_of(objective: PreferenceObjective, num_epochs: int = 2) -> BatchPlan:
    pairs = objective.dataset.pairs_per_group
    return BatchPlan(pairs, seed=3, num_epochs=num_epochs, pairs_per_step=8, max_steps=None)


def stream(objective: PreferenceObjective, **options: Any) -> list[MicroBatch]:
    given: dict[str, Any] = {
        "first_step": 1,
        "layout": "packed",
        "device": torch.device("cpu"),
        "budget": 40,
        "cached": False,
        "rank": 0,
        "world_size": 1,
    }
    return list(micro_batches(objective, plan_of(objective), **{**given, **options}))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_step_has_the_plans_groups_over_all_ranks(
    objective: PreferenceObjective, world_size: int
) -> None:
    plan = plan_of(objective)
    ranks = [stream(objective, rank=rank, world_size=world_size) for rank in range(world_size)]
    for number in range(1, plan.num_steps + 1):
        parts = [[micro for micro in rank if micro.step.number == number] for rank in ranks]
        groups = sorted(int(group) for part in parts for micro in part for group in micro.groups)
        assert groups == sorted(plan.step(number).groups.tolist())
        assert len({len(part) for part in parts}) == 1  # ranks make the same number of engine calls
        for part in parts:
            assert [micro.index for micro in part] == list(range(part[0].of))
            assert [micro.last for micro in part] == [False] * (len(part) - 1) + [True]


def test_a_resumed_stream_is_the_rest_of_the_whole_one(objective: PreferenceObjective) -> None:
    whole = [micro for micro in stream(objective) if micro.step.number >= 3]
    for one, other in zip(whole, stream(objective, first_step=3), strict=True):
        assert torch.equal(one.batch.input_ids, other.batch.input_ids)
        assert one.step.number == other.step.number


def test_the_next_steps_first_batch_is_built_while_this_step_computes(objective: PreferenceObjective) -> None:
    """With one micro-batch per step nothing would overlap if each step had a stream of its own."""
    built = threading.Event()
    plan, plain = plan_of(objective), objective.batch
    second = plan.step(2).groups.tolist()

    class Noted:
        dataset, count = objective.dataset, objective.count

        def batch(self, groups: Int64s, layout: Layout) -> TreeBatch:
            if groups.tolist() == second or set(groups.tolist()) <= set(second):
                built.set()
            return plain(groups, layout)

    noted: Any = Noted()
    batches = prefetch(
        micro_batches(
            noted,
            plan_of(objective),
            first_step=1,
            layout="packed",
            device=torch.device("cpu"),
            budget=100_000,
            cached=False,
            rank=0,
            world_size=1,
        )
    )
    first = next(batches)
    assert first.step.number == 1
    assert first.last
    assert built.wait(10)  # and nobody has asked for the second step yet
    batches.close()


TOKENS = st.integers(1, 30).map(lambda n: np.ones(n, dtype=np.int32))


@given(
    TOKENS, st.lists(TOKENS, min_size=1, max_size=9), st.integers(2, 80), st.sampled_from(["packed", "rows"])
)
def test_a_group_that_is_too_large_is_cut_between_completions(
    prompt: TokenIds, completions: list[TokenIds], budget: int, layout: Layout
) -> None:
    pieces = cut([(prompt, completions)], layout, budget)
    kept = [completion for ((_, part),) in pieces for completion in part]
    assert all(one is other for one, other in zip(kept, completions, strict=True))
    for ((again, part),) in pieces:
        assert again is prompt
        assert len(part) == 1 or tree_batch([(again, part)], layout).input_ids.numel() <= budget


def test_several_groups_are_one_piece_and_so_are_none() -> None:
    tree = (np.ones(50, dtype=np.int32), [np.ones(50, dtype=np.int32)] * 3)
    assert cut([tree, tree], "packed", 10) == [[tree, tree]]
    assert cut([], "packed", 10) == [[]]


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_pieces_are_equally_many_on_all_ranks_and_cover_the_whole_in_order(
    objective: PreferenceObjective, world_size: int
) -> None:
    ranks = [stream(objective, rank=rank, world_size=world_size, cached=True) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1
    for rank in ranks:
        for number in {micro.step.number for micro in rank}:
            pieces = [micro for micro in rank if micro.step.number == number]
            whole = pieces[0].whole
            assert whole is not None
            targets = torch.cat([piece.batch.targets for piece in pieces])
            assert torch.equal(targets, whole.targets)
            assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert len(ranks[0]) > len(stream(objective, world_size=world_size))  # a budget of 40 cuts some groups
