"""What goes wrong while the cache is filled: finished work is on the disk, and a person is told why."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from unit.reference.samples import append, content, raw, store_of, with_options

from dpo import distributed
from dpo.config import Config
from dpo.data.dataset import TokenizedDataset
from dpo.data.trees import TreeBatch
from dpo.errors import StoppedBySignal, UserError
from dpo.model.load import load_model
from dpo.reference.precompute import _missing, plan_batches, precompute
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
    plan = plan_batches([data], _missing(config, [data], store).sequences, "packed", budget=80)
    assert len(plan.offsets) > 5
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
    message = (
        r"the reference model gave 1 of \d+ log-probs that are not finite; none of this batch was stored"
    )
    with pytest.raises(UserError, match=message):
        precompute(config, [data], store)
    assert len(content(store)) == finished
    around_scorer(lambda number, score, batch: score(batch))  # whole again: only the rest is computed
    result = precompute(config, [data], store)
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
    with pytest.raises(UserError, match="log-probs that are not finite"):
        precompute(damaged, [data], store_of(damaged))
    assert content(store_of(damaged)) == {}


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "stop", [interrupt, lambda: os.kill(os.getpid(), signal.SIGTERM)], ids=["INT", "TERM"]
)
def test_a_signal_stops_after_what_was_computed_is_written(
    experiment: Experiment, preference_rows: MakeRows, around_scorer: Around, stop: Callable[[], None]
) -> None:
    config, data, store, finished = many_batches(experiment, preference_rows(12))
    handler = signal.getsignal(signal.SIGTERM)

    def stopped(number: int, score: Score, batch: TreeBatch) -> Tensor:
        if number == 2:
            stop()
        return score(batch)

    around_scorer(stopped)
    with pytest.raises(StoppedBySignal, match=rf"{store.path}: what was computed is kept; the same command"):
        precompute(config, [data], store)
    assert len(content(store)) == finished
    assert signal.getsignal(signal.SIGTERM) is handler
    around_scorer(lambda number, score, batch: score(batch))
    assert precompute(config, [data], store).hits == finished


def test_any_other_failure_keeps_what_was_computed_too(
    experiment: Experiment, preference_rows: MakeRows, around_scorer: Around
) -> None:
    config, data, store, finished = many_batches(experiment, preference_rows(12))

    def failing(number: int, score: Score, batch: TreeBatch) -> Tensor:
        if number == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(batch)

    around_scorer(failing)
    with pytest.raises(UserError, match=r"reference\.max_tokens_per_batch: 80 tokens do not fit"):
        precompute(config, [data], store)
    assert len(content(store)) == finished


def test_a_full_disk_is_a_users_error_and_keeps_what_was_written(
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
        precompute(with_options(config, flush_every_seconds=0.0), [data], store)
    assert len(content(store)) == finished


def test_on_a_cpu_a_rank_computes_with_one_thread_and_gives_the_others_back(
    experiment: Experiment, preference_rows: MakeRows, around_scorer: Around, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cpu"))
    config, data = experiment(preference_rows(2))
    seen, before = [], torch.get_num_threads()

    def noting(number: int, score: Score, batch: TreeBatch) -> Tensor:
        seen.append(torch.get_num_threads())
        if len(seen) > 1:
            raise torch.OutOfMemoryError
        return score(batch)

    around_scorer(noting)
    try:
        torch.set_num_threads(3)
        precompute(config, [data], store_of(config))
        assert torch.get_num_threads() == 3
        with pytest.raises(UserError):  # and after a failure
            precompute(config, [data], store_of(config, Path(config.run_dir)))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def test_a_cache_that_is_damaged_is_refused_before_anything_is_computed(
    experiment: Experiment, preference_rows: MakeRows, no_model: None
) -> None:
    config, data = experiment(preference_rows(2))
    store = store_of(config)
    store.create()
    append(store, {b"a": (-1.0, 1)}).write_bytes(b"PAR1")
    with pytest.raises(UserError, match="damaged shard"):
        precompute(config, [data], store)


def test_a_cache_dir_that_cannot_be_written_is_refused_by_its_key(
    experiment: Experiment, preference_rows: MakeRows, no_model: None, tmp_path: Path
) -> None:
    config, data = experiment(preference_rows(2))
    (tmp_path / "file").write_text("not a folder")
    store = ReferenceStore(tmp_path / "file" / "cache", store_of(config).identity)
    with pytest.raises(UserError, match=r"^reference\.cache_dir: cannot write .*file/cache"):
        precompute(config, [data], store)
