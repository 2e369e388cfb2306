"""`dpo check` knows the launcher that a shell will start, and refuses what would fail under it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dpo.cli.main import run

ROOT = Path(__file__).parents[3]


@pytest.fixture
def finished_run(tiny_model: Path, tmp_path: Path) -> Path:
    """A run folder with a model, as training leaves it."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()
    shutil.copytree(tiny_model, folder / "model")
    return folder


@pytest.mark.parametrize(
    ("launcher", "optimizer", "refused"),
    [
        ("one_node.yaml", "muon", "ZeRO-2"),
        ("one_node_zero3.yaml", "adafactor", "ZeRO-3"),
        ("one_node.yaml", "adamw_8bit", "ZeRO-2"),
        ("one_node.yaml", "lion", ""),
        ("one_node_ddp.yaml", "muon", ""),
        ("one_process.yaml", "adafactor", ""),
    ],
)
def test_an_optimizer_that_the_launcher_would_shard(
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    launcher: str,
    optimizer: str,
    refused: str,
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("ACCELERATE_CONFIG", f"launch/{launcher}")
    keys = ["--model.name_or_path", str(tiny_model), "--data.train", str(pairs_file)]
    keys += ["--run_dir", str(tmp_path / "run"), "--train.optimizer", optimizer]
    status, said = run(["check", *keys]), capsys.readouterr().err
    assert status == (2 if refused else 0), said
    lines = [line for line in said.splitlines() if "train.optimizer" in line]
    assert len(lines) == bool(refused)
    assert refused in said


@pytest.mark.parametrize("command", ["evaluate", "best-of"])
def test_a_scorer_that_cannot_be_used(
    tiny_model: Path,
    finished_run: Path,
    pairs_file: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
) -> None:
    keys = ["--model.name_or_path", str(tiny_model), "--data.train", str(pairs_file)]
    keys += ["--run_dir", str(finished_run), "--evaluate.completion_tokens", "4"]
    assert run(["check", command, *keys, "--evaluate.scorer", "vader"]) == 0, capsys.readouterr().err
    assert run(["check", command, *keys, "--evaluate.scorer", "hf:./nowhere/at/all"]) == 2
    assert "scorer hf:./nowhere/at/all: cannot load" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_transformers_classes_of_models_are_not_imported(
    finished_run: Path, pairs_file: Path, command: str
) -> None:
    """Importing them takes as long as the check itself, which comes before every stage."""
    run_dir = finished_run if command == "evaluate" else finished_run.with_name("new")
    code = (
        "import sys\nfrom dpo.cli.main import run\n"
        "assert run(sys.argv[1:]) == 0\n"
        "assert 'transformers.modeling_utils' not in sys.modules\n"
    )
    keys = ["--model.name_or_path", str(finished_run / "model"), "--data.train", str(pairs_file)]
    keys += ["--run_dir", str(run_dir), "--evaluate.scorer", "vader", "--evaluate.completion_tokens", "4"]
    done = subprocess.run(
        [sys.executable, "-c", code, "check", command, *keys],
        env={**os.environ, "ACCELERATE_CONFIG": "launch/cpu.yaml"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
