"""Filling the cache: each sequence once, missing rows only, and the values of a live model (law 2)."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpo import distributed
from dpo.config import Config
from dpo.data.batches import sequence_batch
from dpo.data.dataset import TokenizedDataset
from dpo.errors import UserError
from dpo.model.load import load_model
from dpo.model.logprobs import SequenceScorer
from dpo.reference import precompute as precompute_module
from dpo.reference.identity import reference_identity
from dpo.reference.precompute import precompute, reference_logps
from dpo.reference.store import ReferenceStore

Rows = list[dict[str, Any]]


@pytest.fixture
def experiment(
    make_config: Callable[..., Config],
    open_data: Callable[[Config], TokenizedDataset],
    write_jsonl: Callable[..., str],
) -> Callable[[Rows], tuple[Config, TokenizedDataset]]:
    """(configuration, data in token ids) of rows."""

    def make(rows: Rows) -> tuple[Config, TokenizedDataset]:
        config = make_config(write_jsonl(rows))
        return config, open_data(config)

    return make


Experiment = Callable[[Rows], tuple[Config, TokenizedDataset]]
MakeRows = Callable[..., Rows]


def store_of(config: Config, cache_dir: Path | None = None) -> ReferenceStore:
    root = cache_dir or Path(config.reference.cache_dir)
    return ReferenceStore(root, reference_identity(config.model, root))


def with_budget(config: Config, **options: Any) -> Config:
    return replace(config, reference=replace(config.reference, **options))


def live_logps(config: Config, data: TokenizedDataset) -> torch.Tensor:
    """(S,) one sequence at a time, with the model beside us."""
    scorer = SequenceScorer(load_model(config.model))
    sequences = [(data[g].prompt, c) for g in range(len(data)) for c in data[g].completions]
    with torch.no_grad():
        return torch.cat([scorer(sequence_batch([sequence])) for sequence in sequences])


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(precompute_module, "load_model", refuse)


def test_cached_equals_live_for_every_sequence_in_order(
    experiment: Experiment, preference_rows: MakeRows
) -> None:
    config, data = experiment(preference_rows(20))
    store = store_of(config)
    precompute(config, [data], store)
    cached = reference_logps(data, store, "command")
    assert cached.shape == (int(data.sequences_per_group.sum()),)
    torch.testing.assert_close(torch.from_numpy(cached), live_logps(config, data), rtol=0, atol=1e-4)
    assert cached.std() > 1  # the values differ enough for their order to be tested


def test_each_different_sequence_is_computed_once(experiment: Experiment) -> None:
    shared = {"prompt": "the cat", "chosen": " sat", "rejected": " on"}
    other = {"prompt": "the cat", "chosen": " sat", "rejected": " mat"}  # shares its chosen completion
    config, data = experiment([shared, other, shared])
    result = precompute(config, [data, data], store_of(config))
    assert (result.hits, result.misses) == (0, 3)
    assert len(store_of(config).load().keys) == 3
    logps = reference_logps(data, store_of(config), "")
    assert logps[0] == logps[2] == logps[4]
    assert len(set(logps.tolist())) == 3


def test_a_second_call_computes_nothing_and_loads_no_model(
    experiment: Experiment, preference_rows: MakeRows, monkeypatch: pytest.MonkeyPatch, request: Any
) -> None:
    config, data = experiment(preference_rows(5))
    first = precompute(config, [data], store_of(config))
    request.getfixturevalue("no_model")
    second = precompute(config, [data], store_of(config))
    assert (second.hits, second.misses, second.seconds) == (first.misses, 0, 0.0)


def test_a_cold_cache_does_load_the_model(
    experiment: Experiment, preference_rows: MakeRows, no_model: None
) -> None:
    config, data = experiment(preference_rows(2))
    with pytest.raises(AssertionError, match="a model was loaded"):
        precompute(config, [data], store_of(config))


def test_only_new_rows_are_computed(experiment: Experiment, preference_rows: MakeRows) -> None:
    config, few = experiment(preference_rows(4))
    before = precompute(config, [few], store_of(config))
    old = store_of(config).load()
    config, more = experiment(preference_rows(9))
    after = precompute(config, [more], store_of(config))
    assert (after.hits, after.misses) == (before.misses, len(set(more.keys.tolist())) - before.misses)
    shards = list(store_of(config).path.glob("part-*.parquet"))
    assert len(shards) == 2
    new = store_of(config).load()
    assert np.array_equal(new.logps[new.find(few.keys)], old.logps[old.find(few.keys)])


def test_learning_rate_beta_and_batch_size_use_the_same_cache(
    experiment: Experiment, preference_rows: MakeRows, request: Any
) -> None:
    config, data = experiment(preference_rows(3))
    precompute(config, [data], store_of(config))
    request.getfixturevalue("no_model")
    train = replace(config.train, learning_rate=1.0, pairs_per_step=3, seed=7)
    changed = replace(config, run_dir="other", train=train, loss=replace(config.loss, beta=5.0))
    assert precompute(changed, [data], store_of(changed)).misses == 0


def test_batches_do_not_depend_on_the_number_of_ranks(
    experiment: Experiment, preference_rows: MakeRows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, data = experiment(preference_rows(12))
    config = with_budget(config, max_tokens_per_batch=80)
    alone = store_of(config)
    precompute(config, [data], alone)
    whole, both = alone.load(), []
    for rank in range(2):  # each into a folder of its own, so that neither sees the other's rows
        monkeypatch.setattr(distributed, "share_of", lambda items, rank=rank: items[rank::2])
        mine = store_of(config, tmp_path / f"rank{rank}")
        precompute(config, [data], mine)
        both.append(mine.load())
    assert min(len(table.keys) for table in both) > 0
    keys = np.concatenate([table.keys for table in both])
    logps = np.concatenate([table.logps for table in both])
    order = np.argsort(keys)
    assert np.array_equal(keys[order], whole.keys)
    assert np.array_equal(logps[order], whole.logps)  # bit for bit


def test_the_budget_bounds_every_batch_and_changes_no_value(
    experiment: Experiment, preference_rows: MakeRows, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, data = experiment(preference_rows(12))
    sizes: list[int] = []

    def counting(sequences: Any) -> Any:
        batch = sequence_batch(sequences)
        sizes.append(batch.input_ids.numel())
        return batch

    monkeypatch.setattr(precompute_module, "sequence_batch", counting)
    stores = []
    for budget in (60, 10_000):
        sizes.clear()
        limited = with_budget(config, max_tokens_per_batch=budget)
        stores.append(store_of(limited, tmp_path / str(budget)))
        precompute(limited, [data], stores[-1])
        assert max(sizes) <= budget
        assert (len(sizes) == 1) == (budget == 10_000)
    small, large = (reference_logps(data, store, "") for store in stores)
    assert small == pytest.approx(large, rel=0, abs=1e-4)


def test_work_is_written_as_it_is_done(experiment: Experiment, preference_rows: MakeRows) -> None:
    config, data = experiment(preference_rows(12))
    config = with_budget(config, max_tokens_per_batch=60, flush_every_seconds=0.0)
    precompute(config, [data], store_of(config))
    assert len(list(store_of(config).path.glob("part-*.parquet"))) > 3
    assert (store_of(config).load().find(data.keys) >= 0).all()


def test_a_cache_that_lacks_rows_is_refused_with_the_command(
    experiment: Experiment, preference_rows: MakeRows
) -> None:
    config, few = experiment(preference_rows(4))
    precompute(config, [few], store_of(config))
    _, more = experiment(preference_rows(9))
    lacking = len(more.keys) - len(few.keys)
    message = rf"lacks {lacking} of the {len(more.keys)} sequences .* Run: make precompute-ref"
    with pytest.raises(UserError, match=message):
        reference_logps(more, store_of(config), "make precompute-ref")


def test_a_row_of_another_length_is_refused(experiment: Experiment, preference_rows: MakeRows) -> None:
    config, data = experiment(preference_rows(1))
    store = store_of(config)
    store.create()
    number = len(data.keys)
    store.append(np.asarray(data.keys), np.full(number, -1.0), np.full(number, 63, dtype=np.int32))
    with pytest.raises(UserError, match="another number of tokens than the data"):
        reference_logps(data, store, "command")
