"""The reference cache with real ranks, real kills, and two concurrent builders."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import output_of, run_ranks, start_ranks, wait

from dpo.cli.main import run
from dpo.reference.shards import read_shard, write_shard
from dpo.reference.store import ReferenceStore
from dpo.reference.table import ReferenceTable, tolerance

ROOT = Path(__file__).parents[2]
KILLS = 24


@pytest.fixture(scope="module")
def experiment(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    preference_rows: Callable[..., list[dict[str, Any]]],
) -> Callable[..., list[str]]:
    """experiment(folder): arguments of an experiment on 600 groups with its reference cache in `folder`."""
    shared = tmp_path_factory.mktemp("shared")
    rows = preference_rows(600)
    (shared / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def arguments(folder: Path, **keys: Any) -> list[str]:
        values = {
            "run_dir": folder / "run",
            "model.name_or_path": tiny_model,
            "model.dtype": "float32",
            "data.train": shared / "data.jsonl",
            "data.cache_dir": shared / "tokenized",
            "reference.cache_dir": folder / "reference",
            "reference.max_tokens_per_batch": 128,
            "reference.flush_every_seconds": 0,
        } | {key.replace("__", "."): value for key, value in keys.items()}
        return [word for key, value in values.items() for word in (f"--{key}", str(value))]

    return arguments


Experiment = Callable[..., list[str]]


def store_in(folder: Path) -> ReferenceStore:
    (identity,) = (folder / "reference").glob("*/identity.json")
    return ReferenceStore.at(identity.parent)


@pytest.fixture(scope="module")
def whole(experiment: Experiment, tmp_path_factory: pytest.TempPathFactory) -> ReferenceTable:
    """The cache of an uninterrupted build by one rank."""
    folder = tmp_path_factory.mktemp("whole")
    statuses, text = run_ranks(1, ["precompute-ref", *experiment(folder)], folder / "logs")
    assert statuses == [0], text
    return store_in(folder).load()


def same_rows(table: ReferenceTable, whole: ReferenceTable) -> None:
    """Asserts equal keys and token counts, and values within the audit's tolerance."""
    assert np.array_equal(table.index.keys, whole.index.keys)
    assert np.array_equal(table.num_tokens, whole.num_tokens)
    assert (np.abs(table.logps - whole.logps) <= tolerance("float32", whole.num_tokens)).all()


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_ranks_computes_the_same_bits(
    experiment: Experiment, whole: ReferenceTable, tmp_path: Path, world_size: int
) -> None:
    statuses, text = run_ranks(world_size, ["precompute-ref", *experiment(tmp_path)], tmp_path / "logs")
    assert statuses == [0] * world_size, text
    table = store_in(tmp_path).load()
    assert np.array_equal(table.index.keys, whole.index.keys)
    assert np.array_equal(table.num_tokens, whole.num_tokens)
    assert np.array_equal(table.logps, whole.logps)


def test_a_build_that_is_killed_many_times_ends_with_the_same_rows(
    experiment: Experiment, whole: ReferenceTable, tmp_path: Path
) -> None:
    chance = random.Random(0)
    arguments, before, inside = ["precompute-ref", *experiment(tmp_path)], 0, 0
    for number in range(KILLS):
        processes = start_ranks(2, arguments, tmp_path / f"logs{number}")
        if number % 4 == 3:  # while it starts
            time.sleep(chance.uniform(0, 0.6))
        else:  # while it writes: shortly after one of the next shards
            shards, deadline = num_shards(tmp_path) + chance.randrange(1, 4), time.monotonic() + 60
            running = True
            while num_shards(tmp_path) < shards and running and time.monotonic() < deadline:
                running = all(process.is_alive() for process in processes)
                time.sleep(0.001)
            time.sleep(chance.uniform(0, 0.02))
        processes[number % 2].kill()
        if number % 3:  # at the same time; otherwise the other rank must exit by itself
            processes[1 - number % 2].kill()
        wait(processes, seconds=0.2)
        if num_shards(tmp_path):
            rows = len(store_in(tmp_path).load())
            assert rows >= before, "a kill lost finished rows"
            inside += before < rows < len(whole)
            before = rows
        if before == len(whole) and number < KILLS - 1:  # on a fast machine: delete rows again
            for shard in store_in(tmp_path).shards()[::2]:
                shard.unlink()
            before = len(store_in(tmp_path).load())
    assert inside >= KILLS // 3, f"only {inside} of {KILLS} kills hit a build that was writing"
    statuses, text = run_ranks(2, arguments, tmp_path / "logs")
    assert statuses == [0, 0], text
    summary = f"reference  {before} sequences were cached, {len(whole) - before} computed"
    assert summary in text
    same_rows(store_in(tmp_path).load(), whole)


def wait_for(event: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not event():
        assert time.monotonic() < deadline, "timeout"
        time.sleep(0.001)


def pid_of(process: ForkServerProcess) -> int:
    assert process.pid is not None
    return process.pid


def num_shards(folder: Path) -> int:
    return len(list((folder / "reference").glob("*/part-*.parquet")))


def test_two_concurrent_builders_write_one_valid_cache(
    experiment: Experiment, whole: ReferenceTable, tmp_path: Path
) -> None:
    arguments = ["precompute-ref", *experiment(tmp_path)]
    (first,) = start_ranks(1, arguments, tmp_path / "logs0")
    wait_for(lambda: num_shards(tmp_path) > 0)
    os.kill(pid_of(first), signal.SIGSTOP)  # the second builder now computes rows that the first has planned
    assert wait(start_ranks(1, arguments, tmp_path / "logs1")) == [0], output_of(tmp_path / "logs1")
    os.kill(pid_of(first), signal.SIGCONT)
    assert wait([first]) == [0], output_of(tmp_path / "logs0")
    store = store_in(tmp_path)
    written = sum(len(read_shard(path, store.identity.digest)) for path in store.shards())
    assert written > len(whole), "the builders did not overlap"
    same_rows(store.load(), whole)
    assert run(["cache", "verify", str(store.path)]) == 0


def test_a_signal_keeps_computed_rows_and_exits_with_3(
    experiment: Experiment, whole: ReferenceTable, tmp_path: Path
) -> None:
    arguments = ["precompute-ref", *experiment(tmp_path, reference__flush_every_seconds=3600)]
    often = "from dpo import terminal; terminal.FILE_SECONDS = 0.0"
    (process,) = start_ranks(1, arguments, tmp_path / "logs", before=often)
    wait_for(lambda: re.search(r"log-probs: [1-9][\d.]*[kM]?/", output_of(tmp_path / "logs")) is not None)
    os.kill(pid_of(process), signal.SIGTERM)
    assert wait([process]) == [3], output_of(tmp_path / "logs")
    assert "SIGTERM" in output_of(tmp_path / "logs")
    assert 0 < len(store_in(tmp_path).load()) < len(whole)
    assert wait(start_ranks(2, arguments, tmp_path / "again")) == [0, 0]
    same_rows(store_in(tmp_path).load(), whole)


@pytest.mark.parametrize("key", ["reference.cache_dir", "data.cache_dir"])
def test_a_cache_on_node_local_disks_is_refused_on_all_ranks(
    experiment: Experiment, tmp_path: Path, key: str
) -> None:
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        node.mkdir()
    arguments = ["precompute-ref", *experiment(tmp_path, **{key: "local"})]
    statuses, text = run_ranks(2, arguments, tmp_path / "logs", folders=nodes)
    assert statuses == [2, 2], text
    assert f"{key}: local is not shared" in text
    assert all(f"{node}/local" in text for node in nodes)
    assert "rank 1" in text
    assert not list((nodes[0] / "local").glob(".shared.*")), "a test file was left behind"


ZERO_2 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(ROOT / "configs" / "ds_zero2.json"),
}


def test_zero_3_computes_the_same_bits_and_training_settings_change_nothing(
    experiment: Experiment, whole: ReferenceTable, tmp_path: Path
) -> None:
    arguments = ["precompute-ref", *experiment(tmp_path, reference__sharding="zero3")]
    assert wait(start_ranks(2, arguments, tmp_path / "sharded", variables=ZERO_2)) == [0, 0]
    assert np.array_equal(store_in(tmp_path).load().logps, whole.logps)
    changed = {"train__learning_rate": 1.0, "loss__beta": 3.0, "train__seed": 9, "train__pairs_per_step": 3}
    _, text = run_ranks(1, ["precompute-ref", *experiment(tmp_path, **changed)], tmp_path / "changed")
    assert f"{len(whole)} sequences were cached, 0 computed" in text


def test_a_cache_with_wrong_values_stops_a_run_before_its_first_step(
    experiment: Experiment, whole: ReferenceTable, tmp_path: Path
) -> None:
    assert run_ranks(1, ["precompute-ref", *experiment(tmp_path)], tmp_path / "logs")[0] == [0]
    store = store_in(tmp_path)
    for path in store.shards():
        rows = read_shard(path, store.identity.digest)
        path.unlink()
        write_shard(store.path, replace(rows, logps=rows.logps - 0.05), store.identity.digest)
    arguments = ["train", *experiment(tmp_path, train__max_steps=1, reference__audit_rows=5)]
    assert wait(start_ranks(2, arguments, tmp_path / "train", variables=ZERO_2)) == [2, 2]
    text = output_of(tmp_path / "train")
    assert "audit failed: 5 of 5 " in text
    assert re.search(r"cached -\d+\.\d+, recomputed -\d+\.\d+ nats", text)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
