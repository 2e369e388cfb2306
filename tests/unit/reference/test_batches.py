"""The plan of a cache build: every missing sequence once, batches within the budget, blind to the ranks."""

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unit.reference.samples import raw, store_of

from dpo import distributed
from dpo.config import Config
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import deal
from dpo.data.trees import Layout
from dpo.reference import batches
from dpo.reference.batches import MissingPlan, batch_offsets, even_budget, place_of, plan_batches
from dpo.reference.precompute import find_missing

Rows = list[dict[str, Any]]
Experiment = Callable[[Rows], tuple[Config, TokenizedDataset]]
Group = tuple[int, list[int]]
"""Tokens of a prompt, and of each of its completions."""
Work = tuple[list[list[Group]], list[int]]
"""The groups of each data set, and which sequences are missing, in some order."""

LENGTHS = st.lists(st.integers(1, 50), max_size=60).map(lambda lengths: sorted(lengths, reverse=True))
GROUPS = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)), min_size=1, max_size=6
)
LAYOUTS = st.sampled_from(get_args(Layout))
BUDGETS = st.integers(1, 80)


@st.composite
def work(draw: st.DrawFn) -> Work:
    datasets = draw(st.lists(GROUPS, min_size=1, max_size=3))
    total = sum(len(completions) for groups in datasets for _, completions in groups)
    sequences = draw(st.permutations(range(total)))
    return datasets, sequences[: draw(st.integers(1, total))]


def data_of(groups: Sequence[Group]) -> TokenizedDataset:
    """A data set in memory, of which only the lengths matter."""
    segments = [length for prompt, completions in groups for length in (prompt, *completions)]
    num_sequences = len(segments) - len(groups)
    return TokenizedDataset(
        path=Path(),
        digest="",
        counts={},
        sources=(),
        largest_id=0,
        tokens=np.zeros(sum(segments), dtype=np.int32),
        segment_offsets=np.array([0, *accumulate(segments)], dtype=np.int64),
        group_segments=np.array([0, *accumulate(1 + len(c) for _, c in groups)], dtype=np.int64),
        pairs=np.zeros((0, 2), dtype=np.int32),
        group_pairs=np.zeros(len(groups) + 1, dtype=np.int64),
        margins=np.zeros(0),
        quantiles=np.zeros(num_sequences),
        keys=np.zeros(num_sequences, dtype="V16"),
    )


def plan_work(of: Work, layout: Layout, budget: int) -> MissingPlan:
    datasets, sequences = of
    return plan_batches([data_of(groups) for groups in datasets], np.array(sequences), layout, budget)


def trees_of(plan: MissingPlan) -> list[list[int]]:
    """The sequences of every tree, batch after batch."""
    return [tree for number in range(plan.num_batches) for tree in plan.batch(number)]


@given(work(), LAYOUTS, BUDGETS)
def test_each_missing_sequence_is_in_one_batch(of: Work, layout: Layout, budget: int) -> None:
    planned = [sequence for tree in trees_of(plan_work(of, layout, budget)) for sequence in tree]
    assert sorted(planned) == sorted(of[1])


@given(work(), LAYOUTS, BUDGETS)
def test_no_batch_exceeds_the_budget_unless_it_is_a_single_tree(
    of: Work, layout: Layout, budget: int
) -> None:
    plan = plan_work(of, layout, budget)
    sizes = [len(plan.batch(number)) for number in range(plan.num_batches)]
    assert all(size == 1 or work <= budget for size, work in zip(sizes, plan.work, strict=True))
    assert min(sizes) >= 1


@given(work(), LAYOUTS, BUDGETS)
def test_a_tree_is_what_is_missing_of_a_group_in_the_given_order(
    of: Work, layout: Layout, budget: int
) -> None:
    datasets, sequences = of
    groups = [group for dataset in datasets for group in dataset]
    group_of = [number for number, (_, completions) in enumerate(groups) for _ in completions]
    length_of = [length for _, completions in groups for length in completions]
    key = (lambda sequence: sequence) if layout == "rows" else group_of.__getitem__
    expected: dict[int, list[int]] = {}
    for sequence in sequences:
        expected.setdefault(key(sequence), []).append(sequence)

    def tokens(tree: list[int]) -> int:
        return groups[group_of[tree[0]]][0] + sum(length_of[sequence] for sequence in tree)

    plan = plan_work(of, layout, budget)
    # The largest tree first; trees of equal size by their first sequence, which `sorted` keeps in order.
    assert trees_of(plan) == sorted(expected.values(), key=tokens, reverse=True)
    assert plan.tokens.tolist() == [tokens(tree) for tree in trees_of(plan)]
    for number in range(plan.num_batches):
        each = [tokens(tree) for tree in plan.batch(number)]
        assert plan.num_tokens(number) == sum(each)
        assert plan.work[number] == (max(each) * len(each) if layout in ("trees", "rows") else sum(each))


@given(work(), LAYOUTS, BUDGETS, st.integers(2, 64))
def test_the_plan_does_not_depend_on_the_number_of_ranks(
    of: Work, layout: Layout, budget: int, world_size: int
) -> None:
    alone = plan_work(of, layout, budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "world_size", lambda: world_size)
        patch.setattr(distributed, "rank", lambda: world_size - 1)
        among_others = plan_work(of, layout, budget)
    for name in ("order", "trees", "offsets", "tokens"):
        assert getattr(among_others, name).tolist() == getattr(alone, name).tolist()


@given(LENGTHS, st.integers(1, 300), st.booleans())
def test_batches_stay_within_the_budget_and_are_as_few_as_it_allows(
    lengths: list[int], budget: int, padded: bool
) -> None:
    def size(start: int, end: int) -> int:
        return lengths[start] * (end - start) if padded else sum(lengths[start:end])

    offsets = batch_offsets(np.array(lengths, dtype=np.int64), budget, padded=padded).tolist()
    assert (offsets[0], offsets[-1]) == (0, len(lengths))
    for start, end in pairwise(offsets):
        assert end > start
        assert end - start == 1 or size(start, end) <= budget
        assert end == len(lengths) or size(start, end + 1) > budget  # one more would not fit


@given(LENGTHS.filter(len), st.integers(1, 300), st.booleans())
def test_the_even_budget_is_the_smallest_for_its_number_of_batches(
    lengths: list[int], budget: int, padded: bool
) -> None:
    tokens = np.array(lengths, dtype=np.int64)

    def number(tokens_each: int) -> int:
        return len(batch_offsets(tokens, tokens_each, padded=padded)) - 1

    even = even_budget(tokens, budget, padded=padded)
    assert 1 <= even <= budget
    assert number(budget) <= number(even) <= 4 * number(budget)
    assert even == 1 or number(even - 1) > number(even)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("num_trees", "world_size"), [(24, 2), (100, 2), (100, 4), (1000, 8), (20_000, 64)])
def test_ranks_share_few_trees_evenly(num_trees: int, world_size: int, padded: bool) -> None:
    lengths = np.random.default_rng(0).integers(60, 300, num_trees)
    tokens = np.sort(lengths)[::-1].astype(np.int64)
    offsets = batch_offsets(tokens, even_budget(tokens, 2048, padded=padded), padded=padded)
    work = np.diff(offsets) * tokens[offsets[:-1]] if padded else np.add.reduceat(tokens, offsets[:-1])
    loads = [work[part].sum() for part in deal(work, world_size)]
    assert np.mean(loads) > 0.95 * max(loads)


def test_many_batches_keep_the_whole_budget() -> None:
    tokens = np.full(batches.ENOUGH, 10, dtype=np.int64)
    assert even_budget(tokens, 19, padded=False) == 19
    assert even_budget(tokens[:-1], 19, padded=False) < 19


def test_a_sequence_is_found_in_its_data_set() -> None:
    datasets = [data_of([(1, [1, 1])]), data_of([(1, [1]), (1, [1, 1])])]
    places = [place_of(datasets, sequence) for sequence in range(5)]
    assert places == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    with pytest.raises(IndexError):
        place_of(datasets, 5)


@pytest.mark.parametrize("layout", get_args(Layout))
def test_the_batches_depend_on_what_is_missing_not_on_the_order_of_the_data(
    experiment: Experiment, preference_rows: Callable[..., Rows], layout: Layout
) -> None:
    rows = preference_rows(12)
    config, data = experiment(rows)

    def batches_of(*datasets: TokenizedDataset) -> list[list[list[bytes]]]:
        missing = find_missing(datasets, store_of(config), per_token=False)
        plan = plan_batches(datasets, missing.sequences, layout, budget=80)
        keys = raw(np.concatenate([dataset.keys for dataset in datasets]))
        return [
            [[keys[sequence] for sequence in tree] for tree in plan.batch(number)]
            for number in range(plan.num_batches)
        ]

    batches = batches_of(data)
    assert len(batches) > 5
    assert sorted(key for batch in batches for tree in batch for key in tree) == sorted({*raw(data.keys)})
    assert max(len(tree) for batch in batches for tree in batch) == 1 or layout != "rows"
    (_, backwards), (_, first), (_, second) = (experiment(part) for part in (rows[::-1], rows[:5], rows[3:]))
    assert batches_of(backwards) == batches
    assert batches_of(data, backwards) == batches
    assert batches_of(second, first) == batches
