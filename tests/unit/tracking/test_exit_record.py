"""exit.json is written into runs of ours, whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from dpo.tracking.exit_record import record_end
from dpo.tracking.run_folder import RunFolder


def recorded(run_dir: Path) -> dict[str, object]:
    return dict(json.loads((run_dir / "exit.json").read_text()))


def test_it_says_what_ended_how_and_where(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").touch()
    (run_dir / "metrics.jsonl").write_text('{"step": 6}\n{"step": 7}\n')
    record_end(RunFolder(run_dir), "train", 3, "stopped", 12.5)
    assert recorded(run_dir) == {
        "command": "train",
        "status": 3,
        "message": "stopped",
        "step": 7,
        "started": 12.5,
        "trained": 7,
        "attempt": 1,
        "gained": 7,
        "attempts_without_a_step": 0,
    }


def test_half_a_line_is_not_a_step(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 6}\n{"st')
    record_end(RunFolder(tmp_path), "train", 1, "", 0.0)
    assert recorded(tmp_path)["step"] == 6


@pytest.mark.parametrize("metrics", [None, "", "[]\n", "not JSON\n"])
def test_a_step_that_cannot_be_read_is_0(tmp_path: Path, metrics: str | None) -> None:
    if metrics is not None:
        (tmp_path / "config.yaml").touch()
        (tmp_path / "metrics.jsonl").write_text(metrics)
    record_end(RunFolder(tmp_path), "train", 1, "", 0.0)
    assert recorded(tmp_path)["step"] == 0


def test_only_training_has_steps(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "metrics.jsonl").write_text('{"step": 6}\n')
    record_end(RunFolder(tmp_path), "evaluate", 0, "done", 0.0)
    assert recorded(tmp_path)["step"] == 0


def test_the_newest_end_counts(tmp_path: Path) -> None:
    record_end(RunFolder(tmp_path / "run"), "precompute-ref", 2, "first", 0.0)
    record_end(RunFolder(tmp_path / "run"), "train", 0, "second", 1.0)
    assert recorded(tmp_path / "run")["message"] == "second"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["exit.json"]


def test_somebody_elses_folder_and_a_file_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    record_end(RunFolder(tmp_path), "train", 2, "refused", 0.0)
    record_end(RunFolder(tmp_path / "thesis.tex"), "train", 2, "refused", 0.0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_disk_that_takes_no_more_leaves_no_half_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    record_end(RunFolder(tmp_path / "run"), "train", 1, "disk full", 0.0)
    assert list((tmp_path / "run").iterdir()) == []


def test_on_a_full_disk_the_launchers_own_file_has_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setenv("EXIT_RECORD", str(tmp_path / "record"))
    record_end(RunFolder(tmp_path / "run"), "train", 2, "disk full", 0.0)
    assert list((tmp_path / "run").iterdir()) == []
    assert json.loads((tmp_path / "record").read_text())["status"] == 2


def test_the_record_of_a_process_that_was_refused_stays_out_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXIT_RECORD", str(tmp_path / "record.json"))
    record_end(RunFolder(tmp_path / "run"), "train", 2, "in use", 0.0, in_use=True)
    assert not (tmp_path / "run").exists()
    assert json.loads((tmp_path / "record.json").read_text())["status"] == 2


def test_attempts_are_counted_by_the_steps_that_they_gain(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    counted = []
    for command, step in (("train", 0), ("train", 4), ("train", 4), ("precompute-ref", 4), ("train", 3)):
        folder.history.write_text("".join(f'{{"step": {number}}}\n' for number in range(step + 1)))
        (tmp_path / "config.yaml").touch()
        record_end(folder, command, 3, "stopped", 0.0)
        found = recorded(tmp_path)
        counted.append(tuple(found[name] for name in ("attempt", "gained", "attempts_without_a_step")))
        if step == 4:
            folder.exit_record.rename(folder.previous_exit_record)  # as launch/run does before a start
    assert counted == [(1, 0, 1), (2, 4, 0), (3, 0, 1), (3, 0, 1), (4, 0, 2)]
