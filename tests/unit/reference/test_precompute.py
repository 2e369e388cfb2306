"""Filling the cache: each sequence once, only missing rows, and the values of a live model (law 2)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from unit.reference.samples import content, fill, raw, store_of, with_options

from dpo import distributed
from dpo.config import Config, ModelConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import deal
from dpo.data.trees import TreeBatch, sequence_batch
from dpo.engine import frozen
from dpo.model.load import load_model
from dpo.model.scorer import SequenceScorer
from dpo.reference import precompute as precompute_module
from dpo.reference.batches import MissingPlan
from dpo.reference.identity import reference_model
from dpo.reference.precompute import _my_batches
from dpo.reference.store import ReferenceStore
from dpo.reference.values import reference_logps, reference_token_logps

Rows = list[dict[str, Any]]
Experiment = Callable[[Rows], tuple[Config, TokenizedDataset]]
MakeRows = Callable[..., Rows]
Score = Callable[[TreeBatch], Tensor]
Around = Callable[[Callable[[int, Score, TreeBatch], Tensor]], None]


def live_token_logps(config: Config, data: TokenizedDataset) -> list[Tensor]:
    """S tensors of (N,): one sequence at a time, from a model in memory."""
    scorer = SequenceScorer(load_model(reference_model(config.model, config.reference)))
    with torch.no_grad():
        return [
            scorer(sequence_batch([data.sequence(index)]), per_token=True) for index in range(len(data.keys))
        ]


def live_logps(config: Config, data: TokenizedDataset) -> Tensor:
    """(S,) float64."""
    return torch.stack([tokens.double().sum() for tokens in live_token_logps(config, data)])


def test_cached_equals_live_for_every_sequence_in_order(
    experiment: Experiment, preference_rows: MakeRows
) -> None:
    config, data = experiment(preference_rows(20))
    store = store_of(config)
    fill(config, [data], store)
    (cached,) = reference_logps([data], store, "command")
    assert cached.shape == (int(data.sequences_per_group.sum()),)
    torch.testing.assert_close(torch.from_numpy(cached), live_logps(config, data), rtol=0, atol=1e-4)
    assert cached.std() > 1  # the values differ enough for their order to be tested


@pytest.mark.parametrize("named", [False, True], ids=["adapter as policy", "adapter as reference"])
def test_an_adapter_and_its_base_are_the_reference_of_what_starts_from_it(
    experiment: Experiment,
    preference_rows: MakeRows,
    make_adapter: Callable[..., Path],
    tiny_model: Path,
    named: bool,
) -> None:
    config, data = experiment(preference_rows(4))
    base, adapter = live_logps(config, data), str(make_adapter("adapter", tiny_model))
    with_adapter = (
        with_options(config, model=adapter)
        if named
        else replace(config, model=replace(config.model, name_or_path=adapter))
    )
    store = store_of(with_adapter)
    fill(with_adapter, [data], store)
    cached = torch.from_numpy(reference_logps([data], store, "")[0])
    adapted = live_logps(with_options(config, model=adapter), data)
    assert (adapted - base).abs().max() > 1
    torch.testing.assert_close(cached, adapted, rtol=0, atol=1e-4)


def test_each_different_sequence_is_computed_once(experiment: Experiment) -> None:
    shared = {"prompt": "the cat", "chosen": " sat", "rejected": " on"}
    other = {"prompt": "the cat", "chosen": " sat", "rejected": " mat"}  # shares its chosen completion
    config, data = experiment([shared, other, shared])
    result = fill(config, [data, data], store_of(config))
    assert (result.hits, result.misses) == (0, 3)
    assert len(store_of(config).load()) == 3
    first, second = reference_logps([data, data], store_of(config), "")
    assert first[0] == first[2] == first[4]
    assert len(set(first.tolist())) == 3
    assert np.array_equal(first, second)


def test_a_second_call_computes_nothing_and_loads_no_model(
    experiment: Experiment, preference_rows: MakeRows, request: Any
) -> None:
    config, data = experiment(preference_rows(5))
    first = fill(config, [data], store_of(config))
    assert first.seconds > 0
    request.getfixturevalue("no_model")
    second = fill(config, [data], store_of(config))
    assert (second.hits, second.misses, second.seconds) == (first.misses, 0, 0.0)
    assert len(store_of(config).shards()) == 1


def test_a_cold_cache_does_load_the_model(
    experiment: Experiment, preference_rows: MakeRows, no_model: None
) -> None:
    config, data = experiment(preference_rows(2))
    with pytest.raises(AssertionError, match="a model was loaded"):
        fill(config, [data], store_of(config))


def test_only_new_rows_are_computed(experiment: Experiment, preference_rows: MakeRows) -> None:
    config, few = experiment(preference_rows(4))
    before = fill(config, [few], store_of(config))
    (old,) = reference_logps([few], store_of(config), "")
    config, more = experiment(preference_rows(9))
    after = fill(config, [more], store_of(config))
    assert (after.hits, after.misses) == (before.misses, len(set(raw(more.keys))) - before.misses)
    assert len(store_of(config).shards()) == 2
    assert len(store_of(config).load()) == len(set(raw(more.keys)))
    assert np.array_equal(reference_logps([few], store_of(config), "")[0], old)


def test_learning_rate_beta_and_batch_size_use_the_same_cache(
    experiment: Experiment, preference_rows: MakeRows, request: Any
) -> None:
    config, data = experiment(preference_rows(3))
    fill(config, [data], store_of(config))
    request.getfixturevalue("no_model")
    train = replace(config.train, learning_rate=1.0, pairs_per_step=3, seed=7)
    changed = replace(config, run_dir="other", train=train, loss=replace(config.loss, beta=5.0))
    changed = with_options(changed, max_tokens_per_batch=64, flush_every_seconds=0.0)
    assert fill(changed, [data], store_of(changed)).misses == 0


def test_values_do_not_depend_on_the_number_of_ranks(
    experiment: Experiment, preference_rows: MakeRows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, data = experiment(preference_rows(12))
    config = with_options(config, max_tokens_per_batch=80)
    alone = store_of(config)
    fill(config, [data], alone)
    parts = []
    for rank in range(3):  # each with a folder of its own, so that no rank finds the rows of another
        share = lambda plan, *, sharded, rank=rank: deal(plan.work, 3)[rank]  # noqa: E731
        monkeypatch.setattr(precompute_module, "_my_batches", share)
        mine = store_of(config, tmp_path / f"rank{rank}")
        fill(config, [data], mine)
        parts.append(content(mine))
    assert min(map(len, parts)) > 0
    assert sum(map(len, parts)) == len(content(alone))
    assert parts[0] | parts[1] | parts[2] == content(alone)  # bit for bit


@pytest.mark.parametrize(("world_size", "batches"), [(1, 5), (3, 7), (3, 6), (4, 2)])
def test_with_sharded_weights_every_rank_makes_the_same_number_of_passes(
    monkeypatch: pytest.MonkeyPatch, world_size: int, batches: int
) -> None:
    ones = np.ones(batches, dtype=np.int64)
    each = np.arange(batches + 1)
    plan = MissingPlan(order=each[:-1], trees=each, offsets=each, tokens=ones, padded=False)
    shares = []
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    for rank in range(world_size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(_my_batches(plan, sharded=True))
    assert {len(share) for share in shares} == {-(-batches // world_size)}
    dealt = [number for turn in zip(*shares, strict=True) for number in turn]
    assert dealt == [*range(batches), *[None] * (len(dealt) - batches)]


@pytest.mark.parametrize(
    ("choice", "world_size", "fits", "sharded"),
    [
        ("auto", 1, True, False),
        ("auto", 1, False, False),
        ("auto", 2, True, False),
        ("auto", 2, False, True),
        ("replicas", 2, False, False),
        ("zero3", 2, True, True),
    ],
)
def test_a_model_is_sharded_where_asked_for_or_where_it_would_not_fit(
    monkeypatch: pytest.MonkeyPatch,
    choice: Literal["auto", "replicas", "zero3"],
    world_size: int,
    fits: bool,
    sharded: bool,
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: world_size)
    monkeypatch.setattr(frozen, "fits_one_device", lambda model: fits)
    assert frozen.is_sharded(choice, ModelConfig(name_or_path="")) is sharded


def test_the_budget_bounds_every_batch_and_changes_no_value(
    experiment: Experiment, preference_rows: MakeRows, around_scorer: Around, tmp_path: Path
) -> None:
    config, data = experiment(preference_rows(12))
    sizes: list[int] = []

    def counting(number: int, score: Score, batch: TreeBatch) -> Tensor:
        sizes.append(batch.input_ids.numel())
        return score(batch)

    around_scorer(counting)
    stores = []
    for budget in (60, 10_000):
        sizes.clear()
        limited = with_options(config, max_tokens_per_batch=budget)
        stores.append(store_of(limited, tmp_path / str(budget)))
        fill(limited, [data], stores[-1])
        assert max(sizes) <= budget
        assert (len(sizes) == 4) == (budget == 10_000)  # one that fits is cut into four, for ranks to share
    small, large = (reference_logps([data], store, "")[0] for store in stores)
    assert small == pytest.approx(large, rel=0, abs=1e-4)


def test_a_sequence_longer_than_the_budget_is_a_batch_of_its_own(
    experiment: Experiment, preference_rows: MakeRows
) -> None:
    config, data = experiment(preference_rows(3))
    fill(with_options(config, max_tokens_per_batch=2), [data], store_of(config))
    cached = torch.from_numpy(reference_logps([data], store_of(config), "")[0])
    torch.testing.assert_close(cached, live_logps(config, data), rtol=0, atol=1e-4)


def test_work_is_written_as_it_is_done_and_joined_in_the_end(
    experiment: Experiment, preference_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data = experiment(preference_rows(12))
    config = with_options(config, max_tokens_per_batch=60, flush_every_seconds=0.0)
    append, written = ReferenceStore.append, []
    monkeypatch.setattr(
        ReferenceStore, "append", lambda store, rows: written.append(len(rows)) or append(store, rows)
    )
    fill(config, [data], store_of(config))
    assert len(written) > 3
    assert len(store_of(config).shards()) == 1
    assert (store_of(config).load().index.find(data.keys) >= 0).all()


def test_tokens_are_stored_where_they_are_asked_for_and_add_up(
    experiment: Experiment, preference_rows: MakeRows
) -> None:
    config, data = experiment(preference_rows(8))
    config, store = with_options(config, store_token_logps=True, max_tokens_per_batch=80), store_of(config)
    fill(config, [data], store)
    tokens, (sums,) = reference_token_logps(data, store, ""), reference_logps([data], store, "")
    assert tokens.dtype == np.float32
    torch.testing.assert_close(
        torch.from_numpy(tokens), torch.cat(live_token_logps(config, data)), rtol=0, atol=1e-5
    )
    starts = np.cumsum(data.completion_tokens) - data.completion_tokens
    assert np.add.reduceat(tokens.astype(np.float64), starts) == pytest.approx(sums, rel=0, abs=1e-9)


def test_rows_without_tokens_are_computed_once_more_when_tokens_are_asked_for(
    experiment: Experiment, preference_rows: MakeRows, request: Any
) -> None:
    config, data = experiment(preference_rows(6))
    store = store_of(config)
    first = fill(config, [data], store)
    (before,) = reference_logps([data], store, "")
    wanting = with_options(config, store_token_logps=True)
    again = fill(wanting, [data], store)
    assert (again.hits, again.misses) == (0, first.misses)
    request.getfixturevalue("no_model")
    assert fill(wanting, [data], store).misses == 0
    assert fill(config, [data], store).misses == 0  # rows with tokens also have sums
    assert np.array_equal(reference_logps([data], store, "")[0], before)  # the first copy stays in use
    assert len(reference_token_logps(data, store, "")) == data.completion_tokens.sum()
