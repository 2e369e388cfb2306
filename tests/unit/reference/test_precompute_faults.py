"""Failures while the cache is filled: finished work is kept, and the error says what to do."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from unit.reference.samples import append, content, fill, raw, store_of, with_options

from dpo import distributed
from dpo.config import Config
from dpo.data.dataset import TokenizedDataset
from dpo.data.trees import TreeBatch, tree_batch
from dpo.errors import StoppedBySignal, UserError
from dpo.model.load import load_model
from dpo.reference import fill as fill_module
from dpo.reference.batches import plan_batches
from dpo.reference.precompute import find_missing
from dpo.reference.store import ReferenceStore

Rows = list[dict[str, Any]]
Experiment = Callable[[Rows], tuple[Config, TokenizedDataset]]
MakeRows = Callable[..., Rows]
Score = Callable[[TreeBatch], Tensor]
Around = Callable[[Callable[[int, Score, TreeBatch], Tensor]], None]


def many_batches(experiment: Experiment, rows: Rows) -> tuple[Config, TokenizedDataset, ReferenceStore, int]:
    """An experiment with many batches, its empty cache, and the number of rows in the first two batches."""
    config, data = experiment(rows)
    config = with_options(config, max_tokens_per_batch=80)
    store = store_of(config)
    missing = find_missing([data], store, per_token=False)
    plan = plan_batches([data], missing.sequences, "packed", budget=80)
    assert plan.num_batches >= 5
    return config, data, store, int(plan.trees[plan.offsets[2]])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("flush_every", [0.0, 60.0])
def test_values_that_are_not_finite_are_refused_and_finished_batches_kept(
    experiment: Experiment,
    preference_rows: MakeRows,
    around_scorer: Around,
    value: float,
    flush_every: float,
) -> None:
    config, data, store, finished = many_batches(experiment, preference_rows(12))
    config = with_options(config, flush_every_seconds=flush_every)

    def broken(number: int, score: Score, batch: TreeBatch) -> Tensor:
        logps = score(batch).clone()
        logps[0 if number == 2 else slice(0)] = value
        return logps

    around_scorer(broken)
    with pytest.raises(UserError, match=r"1 of \d+ log-probs .* model\.dtype"):
        fill(config, [data], store)
    assert len(content(store)) == finished
    around_scorer(lambda number, score, batch: score(batch))  # a good model again: only the rest is computed
    result = fill(config, [data], store)
    assert (result.hits, result.misses) == (finished, len(set(raw(data.keys))) - finished)


def test_a_model_with_a_damaged_weight_is_refused(
    experiment: Experiment, preference_rows: MakeRows, tiny_model: Path, tmp_path: Path
) -> None:
    config, data = experiment(preference_rows(3))
    load_model(config.model).save_pretrained(tmp_path / "damaged")
    weights = load_file(tmp_path / "damaged" / "model.safetensors")
    weights["transformer.ln_f.weight"][0] = float("nan")
    save_file(weights, tmp_path / "damaged" / "model.safetensors", metadata={"format": "pt"})
    damaged = with_options(config, model=str(tmp_path / "damaged"))
    with pytest.raises(UserError, match=r"log-probs .* model\.dtype"):
        fill(damaged, [data], store_of(damaged))
    assert content(store_of(damaged)) == {}


@pytest.mark.parametrize(
    ("failure", "raised", "message"),
    [
        (StoppedBySignal("SIGTERM"), StoppedBySignal, "SIGTERM"),
        (KeyboardInterrupt("Ctrl-C"), KeyboardInterrupt, "Ctrl-C"),
        (torch.OutOfMemoryError("CUDA out of memory"), UserError, r"reference\.max_tokens_per_batch: 80 "),
    ],
    ids=["a signal", "Ctrl-C", "out of memory"],
)
def test_what_was_computed_is_written_whatever_ends_it(
    experiment: Experiment,
    preference_rows: MakeRows,
    around_scorer: Around,
    failure: BaseException,
    raised: type[BaseException],
    message: str,
) -> None:
    config, data, store, finished = many_batches(experiment, preference_rows(12))

    def failing(number: int, score: Score, batch: TreeBatch) -> Tensor:
        if number == 2:
            raise failure
        return score(batch)

    around_scorer(failing)
    with pytest.raises(raised, match=message):
        fill(config, [data], store)
    assert len(content(store)) == finished
    around_scorer(lambda number, score, batch: score(batch))
    assert fill(config, [data], store).hits == finished


def test_batches_are_put_on_the_device_of_the_main_thread(
    experiment: Experiment, preference_rows: MakeRows, around_scorer: Around, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The current CUDA device is per thread, and 0 in a new one, such as the one that lays out batches."""
    config, data, store, _ = many_batches(experiment, preference_rows(12))
    threads: set[str] = set()

    def device() -> torch.device:
        assert threading.current_thread() is threading.main_thread(), "asked in another thread"
        return torch.device("cpu")

    def laying_out(*arguments: Any) -> Any:
        threads.add(threading.current_thread().name)
        return tree_batch(*arguments)

    monkeypatch.setattr(distributed, "device", device)
    monkeypatch.setattr(fill_module, "tree_batch", laying_out)
    fill(config, [data], store)
    assert threads
    assert threading.main_thread().name not in threads
    assert len(content(store)) == len(set(raw(data.keys)))


def test_a_full_disk_is_a_user_error_and_keeps_what_was_written(
    experiment: Experiment, preference_rows: MakeRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, data, store, finished = many_batches(experiment, preference_rows(12))
    write, calls = ReferenceStore.append, iter(range(1000))

    def filling(store: ReferenceStore, rows: Any) -> Path:
        if next(calls) >= 2:
            raise UserError("cannot write a shard")
        return write(store, rows)

    monkeypatch.setattr(ReferenceStore, "append", filling)
    with pytest.raises(UserError, match="cannot write a shard"):
        fill(with_options(config, flush_every_seconds=0.0), [data], store)
    assert len(content(store)) == finished


def test_on_a_cpu_a_rank_computes_with_one_thread_and_restores_their_number(
    experiment: Experiment, preference_rows: MakeRows, around_scorer: Around, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))
    config, data = experiment(preference_rows(2))
    seen, before, fails = [], torch.get_num_threads(), False

    def noting(number: int, score: Score, batch: TreeBatch) -> Tensor:
        seen.append(torch.get_num_threads())
        if fails:
            raise torch.OutOfMemoryError
        return score(batch)

    around_scorer(noting)
    try:
        torch.set_num_threads(3)
        fill(config, [data], store_of(config))
        assert torch.get_num_threads() == 3
        fails = True
        with pytest.raises(UserError):  # and after a failure
            fill(config, [data], store_of(config, Path(config.run_dir)))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def test_a_damaged_cache_is_refused_before_anything_is_computed(
    experiment: Experiment, preference_rows: MakeRows, no_model: None
) -> None:
    config, data = experiment(preference_rows(2))
    store = store_of(config)
    store.create()
    append(store, {b"a": (-1.0, 1)}).write_bytes(b"PAR1")
    with pytest.raises(UserError, match="damaged shard"):
        fill(config, [data], store)


def test_a_cache_dir_that_cannot_be_written_is_refused_by_its_key(
    experiment: Experiment, preference_rows: MakeRows, no_model: None, tmp_path: Path
) -> None:
    config, data = experiment(preference_rows(2))
    (tmp_path / "file").write_text("not a folder")
    store = ReferenceStore(tmp_path / "file" / "cache", store_of(config).identity)
    with pytest.raises(UserError, match=r"^reference\.cache_dir: cannot write .*file/cache"):
        fill(config, [data], store)
