"""`dpo cache` on a real cache of a tiny model: what it prints, what it changes, and its exit status."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpo.cli.main import run
from dpo.reference.shards import read_shard, write_shard
from dpo.reference.store import ReferenceStore

Command = Callable[..., str]
Rows = list[dict[str, Any]]


@pytest.fixture
def config(
    tiny_model: Path, tmp_path: Path, write_jsonl: Callable[..., str], preference_rows: Callable[..., Rows]
) -> str:
    """An experiment of 8 groups in a file."""
    return experiment(tmp_path, tiny_model, write_jsonl(preference_rows(8), "eight.jsonl"), "config")


def experiment(folder: Path, model: Path, data: str, name: str, *, reference: str | None = None) -> str:
    settings = {
        "run_dir": str(folder / "run"),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"train": data, "cache_dir": str(folder / "tokenized")},
        "reference": {"cache_dir": str(folder / "reference"), "model": reference},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    return str(path)


@pytest.fixture
def dpo(capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command and returns what it printed, or, if it ends in another status than 0, its message."""

    def command(*arguments: str, status: int = 0) -> str:
        capsys.readouterr()
        found = run(arguments)
        captured = capsys.readouterr()
        assert found == status, captured.err
        return captured.err if status else captured.out

    return command


@pytest.fixture
def store(config: str, dpo: Command, tmp_path: Path) -> ReferenceStore:
    """The filled cache of the experiment."""
    dpo("precompute-ref", "--config", config)
    (folder,) = (tmp_path / "reference").glob("*/")
    return ReferenceStore.at(folder)


def in_halves(store: ReferenceStore) -> None:
    """Splits the only shard into two."""
    (path,) = store.shards()
    shard = read_shard(path, store.identity.digest)
    first = np.arange(len(shard)) < len(shard) // 2
    path.unlink()
    for mask in (first, ~first):
        write_shard(store.path, shard.where(mask), store.identity.digest)


def damage(store: ReferenceStore) -> Path:
    path = store.shards()[0]
    path.write_bytes(path.read_bytes()[:-9])
    return path


def test_info_prints_identity_model_rows_and_bytes(
    store: ReferenceStore, dpo: Command, tiny_model: Path
) -> None:
    rows, size = len(store.load()), store.shards()[0].stat().st_size
    output = dpo("cache", "info", str(store.path))
    assert output.startswith(f"{store.path}\n  identity  {store.identity.digest}\n")
    assert f"model.safetensors sha256 {store.identity.weights['model.safetensors'][:16]}" in output
    assert f"  model     {tiny_model} (gpt2, float32)\n" in output
    assert (
        f"  rows      {rows}, 0 of them with log-probs per token, {size / rows:.1f} bytes per row\n" in output
    )
    assert output.endswith(f"  shards    1, {size} bytes, 0 duplicate rows\n")
    (store.path / ".part-1-x.parquet.writing").write_bytes(b"half")
    assert dpo("cache", "info", str(store.path)).endswith(", 1 unfinished files of killed processes\n")


def test_info_of_a_root_covers_every_cache_in_it(
    store: ReferenceStore, config: str, dpo: Command, tmp_path: Path
) -> None:
    dpo("precompute-ref", "--config", config, "--model.dtype", "bfloat16")
    output = dpo("cache", "info", str(tmp_path / "reference"))
    assert output.count("  identity  ") == 2
    assert ("gpt2, float32" in output, "gpt2, bfloat16" in output) == (True, True)


def test_info_with_a_configuration_prints_what_is_covered(
    store: ReferenceStore,
    config: str,
    dpo: Command,
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., Rows],
) -> None:
    rows = len(store.load())
    assert f"  train     {rows} of {rows} sequences covered\n" in dpo("cache", "info", "--config", config)
    half, more = preference_rows(12)[4:8], preference_rows(12)[8:]
    held_out = write_jsonl([*half, *more], "held_out.jsonl")
    output = dpo("cache", "info", "--config", config, "--data.test", held_out)
    covered, all_of = (sum(len(row["completions"]) for row in part) for part in (half, [*half, *more]))
    assert f"  test      {covered} of {all_of} sequences covered\n" in output


@pytest.mark.parametrize("action", ["info", "verify", "prune"])
def test_a_cache_that_does_not_exist_yet_is_refused_with_the_nearest_other_one(
    store: ReferenceStore, config: str, dpo: Command, action: str
) -> None:
    output = dpo("cache", action, "--config", config, "--model.dtype", "bfloat16", status=2)
    assert store.path.name in output
    assert "dtype: float32 -> bfloat16" in output
    assert "precompute-ref" in output


def test_verify_reads_every_shard(store: ReferenceStore, config: str, dpo: Command, tmp_path: Path) -> None:
    in_halves(store)
    expected = f"{store.path}: {len(store.load())} rows in 2 shards, none damaged\n"
    for target in ([str(store.path)], [str(tmp_path / "reference")], ["--config", config]):
        assert dpo("cache", "verify", *target) == expected
    damaged = damage(store)
    output = dpo("cache", "verify", str(store.path), status=2)
    assert output.startswith("dpo: error: 1 of 2 shards")
    assert str(damaged) in output


def test_verify_recomputes_rows(store: ReferenceStore, config: str, dpo: Command) -> None:
    output = dpo("cache", "verify", "--config", config, "--recompute", "5")
    assert f"{store.path}: 5 rows recomputed, largest difference " in output
    rows = len(store.load())
    assert f"{rows} rows recomputed" in dpo("cache", "verify", "--config", config, "--recompute", "10000")


def test_verify_finds_a_wrong_value_by_recomputing(store: ReferenceStore, config: str, dpo: Command) -> None:
    (path,) = store.shards()
    shard = read_shard(path, store.identity.digest)
    wrong = shard.logps.copy()
    wrong[3] += 0.01
    path.unlink()
    store.append(replace(shard, logps=wrong))
    assert "none damaged" in dpo("cache", "verify", "--config", config)  # a wrong value, but no damage
    output = dpo("cache", "verify", "--config", config, "--recompute", "10000", status=2)
    assert f"audit failed: 1 of {len(shard)} " in output


def test_verify_with_data_that_is_not_cached_is_refused(
    store: ReferenceStore,
    config: str,
    dpo: Command,
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., Rows],
) -> None:
    more = write_jsonl(preference_rows(9), "nine.jsonl")
    output = dpo("cache", "verify", "--config", config, "--data.train", more, "--recompute", "2", status=2)
    assert "the cache lacks" in output


def test_prune_joins_shards_and_a_dry_run_changes_nothing(store: ReferenceStore, dpo: Command) -> None:
    in_halves(store)
    rows, shards = store.load(), store.shards()
    size = sum(path.stat().st_size for path in shards)
    output = dpo("cache", "prune", str(store.path), "--dry_run")
    number = len(rows)
    assert output == (
        f"{store.path}: would keep {number} of {number} rows; 2 shards of {size} bytes would be rewritten\n"
    )
    assert store.shards() == shards
    output = dpo("cache", "prune", str(store.path))
    assert output == (
        f"{store.path}: kept {number} of {number} rows; 2 shards of {size} bytes were rewritten; "
        "now 1 shards\n"
    )
    assert np.array_equal(store.load().logps, rows.logps)


def test_prune_drops_what_no_configuration_needs(
    store: ReferenceStore,
    tiny_model: Path,
    dpo: Command,
    tmp_path: Path,
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., Rows],
) -> None:
    rows = preference_rows(8)
    counts = [len(row["completions"]) for row in rows]
    first = experiment(tmp_path, tiny_model, write_jsonl(rows[:3], "first.jsonl"), "first")
    second = experiment(tmp_path, tiny_model, write_jsonl(rows[5:], "second.jsonl"), "second")
    both = sum(counts[:3]) + sum(counts[5:])
    output = dpo("cache", "prune", "--config", first, "--and_config", second)
    assert f"kept {both} of {sum(counts)} rows" in output
    for config in (first, second):
        assert "0 computed" in dpo("precompute-ref", "--config", config)
    assert f"kept {sum(counts[:3])} of {both} rows" in dpo("cache", "prune", "--config", first)


def test_prune_refuses_a_configuration_of_another_model(
    store: ReferenceStore, config: str, tiny_model: Path, dpo: Command, tmp_path: Path
) -> None:
    other_model = Path(shutil.copytree(tiny_model, tmp_path / "other_model"))
    settings = json.loads((other_model / "config.json").read_text())
    (other_model / "config.json").write_text(json.dumps(settings | {"layer_norm_epsilon": 1e-3}))
    eight = str(tmp_path / "eight.jsonl")
    other = experiment(tmp_path, tiny_model, eight, "other", reference=str(other_model))
    before = store.shards()
    output = dpo("cache", "prune", "--config", config, "--and_config", other, status=2)
    assert output.startswith("dpo: error: --and_config: ")
    assert str(store.path) in output
    assert store.shards() == before


def test_prune_does_not_change_a_damaged_cache(store: ReferenceStore, config: str, dpo: Command) -> None:
    in_halves(store)
    damaged, before = damage(store), store.shards()
    assert str(damaged) in dpo("cache", "prune", "--config", config, status=2)
    assert store.shards() == before


def test_cache_commands_write_no_run_folder(store: ReferenceStore, config: str, dpo: Command) -> None:
    run_dir = Path(json.loads(Path(config).read_text())["run_dir"])
    shutil.rmtree(run_dir)  # precompute-ref writes its exit status there
    for action in ("info", "verify", "prune"):
        dpo("cache", action, "--config", config)
    assert not run_dir.exists()
