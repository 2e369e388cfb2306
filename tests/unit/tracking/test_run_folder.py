"""What a run says of itself, and where."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from dpo.cli.parse import parse
from dpo.config import Config, resolved
from dpo.errors import UserError
from dpo.tracking import run_folder
from dpo.tracking.run_folder import RunFolder


@pytest.fixture
def config(make_config: Callable[..., Config]) -> Config:
    return make_config("data.jsonl")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def test_the_written_configuration_reads_back_as_the_same(config: Config, folder: RunFolder) -> None:
    folder.claim(resolved(config))
    assert parse("train", ["--config", str(folder.config)]) == config
    assert folder.settings() == resolved(config)


def test_the_order_of_the_configuration_is_that_of_its_declaration(config: Config, folder: RunFolder) -> None:
    folder.claim(resolved(config))
    assert list(yaml.safe_load(folder.config.read_text())) == [field.name for field in fields(Config)]


def test_an_unchanged_configuration_is_not_written_again(config: Config, folder: RunFolder) -> None:
    folder.claim(resolved(config))
    before = folder.config.stat().st_ino
    folder.claim(resolved(config))
    assert folder.config.stat().st_ino == before
    folder.claim(resolved(config) | {"run_dir": "elsewhere"})
    assert yaml.safe_load(folder.config.read_text())["run_dir"] == "elsewhere"


@pytest.mark.parametrize("content", ["", "- a list", "run_dir: [", "\xff"])
def test_a_damaged_configuration_is_named(folder: RunFolder, content: str) -> None:
    folder.path.mkdir()
    folder.config.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"config\.yaml"):
        folder.settings()


def test_without_a_configuration_there_are_no_settings(folder: RunFolder) -> None:
    assert folder.settings() is None


def test_the_environment_is_described_without_its_variables(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    folder.path.mkdir()
    folder.describe(world_size=1, engine="one device, 1 rank(s)")
    text = folder.environment.read_text()
    described = json.loads(text)
    assert (described["engine"], described["world_size"]) == ("one device, 1 rank(s)", 1)
    assert described["packages"].keys() >= {"torch", "transformers", "deepspeed"}
    assert "hf_secret" not in text


def test_the_commit_is_that_of_the_code_and_not_of_the_working_directory(
    folder: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        names = [f"GIT_{who}_{what}" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")]
        subprocess.run(
            ["git", "-C", str(tmp_path), *command],
            check=True,
            env={**os.environ, **dict.fromkeys(names, "a@b")},
        )
    other = subprocess.run(
        ["git", "-C", str(tmp_path), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    )
    monkeypatch.chdir(tmp_path)
    folder.path.mkdir()
    folder.describe(world_size=1, engine="")
    assert json.loads(folder.environment.read_text())["git_commit"] != other.stdout.strip()
    installed = tmp_path / "venv" / "run_folder.py"  # in somebody's repository, and not part of it
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(run_folder, "__file__", str(installed))
    folder.describe(world_size=1, engine="")
    assert json.loads(folder.environment.read_text())["git_commit"] is None


def test_a_snapshot_has_its_own_model_and_report(folder: RunFolder) -> None:
    assert folder.model() == folder.path / "model"
    assert folder.report() == folder.path / "report"
    assert folder.model(20) == folder.path / "snapshots" / "step_00000020"
    assert folder.report(20) == folder.model(20) / "report"


def test_a_run_is_known_by_its_configuration_or_its_exit_record(folder: RunFolder) -> None:
    folder.path.mkdir()
    assert not folder.is_run
    folder.exit_record.touch()
    assert folder.is_run
    folder.exit_record.unlink()
    folder.config.touch()
    assert folder.is_run


def test_a_run_that_was_killed_at_its_start_left_what_the_launcher_said(folder: RunFolder) -> None:
    folder.path.mkdir()
    folder.launcher_log.touch()
    assert folder.may_be_written
    (folder.path / "notes.txt").touch()
    assert not folder.may_be_written


def test_what_killed_processes_left_is_removed_and_nothing_else(folder: RunFolder, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    (disk / "model").mkdir(parents=True)
    folder.path.mkdir()
    folder.model().symlink_to(disk / "model")
    gone = [
        folder.path / ".config.yaml.0123456789ab.writing",
        folder.checkpoints / ".step_00000004.writing",
        folder.checkpoints / ".step_00000002.universal",
        folder.checkpoints / ".step_00000002.replaced",
        folder.snapshots / ".step_00000002.0123456789ab.writing",
        disk / ".model.0123456789ab.writing",
    ]
    kept = [
        folder.checkpoint(2),
        folder.checkpoints / ".step_00000003.replaced",  # the only copy of its step
        folder.path / ".report.0123456789ab.writing",  # an evaluation may be at work
        disk / ".model2.0123456789ab.writing",
    ]
    for path in (*gone, *kept):
        path.mkdir(parents=True)
        (path / "file").touch()
    folder.remove_leftovers()
    assert [path for path in gone if path.exists()] == []
    assert [path for path in kept if not (path / "file").exists()] == []
