"""`dpo precompute-ref`: what it computes, what a signal leaves behind, and its exit status."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from dpo.cli.main import run
from dpo.guards.signals import STOPPING
from dpo.reference import fill as fill_module
from dpo.reference.store import ReferenceStore


@pytest.fixture(autouse=True)
def hangups_as_python_starts() -> Iterator[None]:
    """Another test of this process may have ended a run, which ignores signals from then on."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def arguments(
    tiny_model: Path,
    tmp_path: Path,
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., list[dict[str, Any]]],
) -> list[str]:
    """The command on an experiment of 12 groups, in many batches."""
    values = {
        "run_dir": tmp_path / "run",
        "model.name_or_path": tiny_model,
        "model.dtype": "float32",
        "data.train": write_jsonl(preference_rows(12)),
        "data.cache_dir": tmp_path / "tokenized",
        "reference.cache_dir": tmp_path / "reference",
        "reference.max_tokens_per_batch": 80,
    }
    return ["precompute-ref", *(word for key, value in values.items() for word in (f"--{key}", str(value)))]


def rows_in(folder: Path) -> int:
    (identity,) = (folder / "reference").glob("*/identity.json")
    return len(ReferenceStore.at(identity.parent).load())


def test_a_finished_run_is_named_before_anything_is_computed(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "exit.json").write_text("{}")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 7}\n')
    assert run(arguments) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "dpo train would not start" in first
    assert "holds a finished run of 7 steps" in first


def test_the_second_time_everything_is_cached(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 0
    rows = rows_in(tmp_path)
    assert f"0 sequences were cached, {rows} computed" in capsys.readouterr().out
    assert run(arguments) == 0
    assert f"{rows} sequences were cached, 0 computed" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["model.name_or_path", "reference.model"])
def test_a_token_beyond_the_embeddings_is_refused_before_the_model_runs(
    arguments: list[str], tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    if key == "model.name_or_path":
        larger = PreTrainedTokenizerFast.from_pretrained(other)
        larger.add_tokens(["good"])
        larger.save_pretrained(other)
    else:
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    assert run([*arguments, f"--{key}", str(other)]) == 2
    message = capsys.readouterr().err
    assert f"{key}: {other} has " in message
    assert not list((tmp_path / "reference").glob("*/identity.json"))


def test_a_loss_without_reference_needs_no_cache(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*arguments, "--loss.type", "simpo"]) == 0
    assert "not needed" in capsys.readouterr().out
    assert not (tmp_path / "reference").exists()


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_signal_keeps_what_was_computed_and_ends_with_status_3(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    handlers = [signal.getsignal(each) for each in STOPPING]
    rows, calls = fill_module._rows, iter(range(1000))

    def signalled(*arguments: Any, **options: Any) -> Any:
        if next(calls) == 2:
            os.kill(os.getpid(), number)
        return rows(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(fill_module, "_rows", signalled)
        assert run(arguments) == 3
    output = capsys.readouterr().err
    assert number.name in output
    assert "what was computed is kept" in output
    assert [signal.getsignal(each) for each in STOPPING] == handlers
    kept = rows_in(tmp_path)
    assert kept > 0
    assert run(arguments) == 0
    assert f"{kept} sequences were cached, {rows_in(tmp_path) - kept} computed" in capsys.readouterr().out


def test_a_signal_before_the_model_is_loaded_ends_with_status_3_too(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def signalled(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("dpo.commands.precompute_ref.open_data", signalled)
    assert run(arguments) == 3
    assert "SIGTERM" in capsys.readouterr().err
