"""User errors: one clear message, status 2, no traceback, and before a model is loaded."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep.cli import main as data_prep
from dpo.cli.main import run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def arguments(tmp_path: Path, tiny_model: Path, pairs_file: Path) -> list[str]:
    """A valid command line, to which each test adds an error."""
    return [
        "--run_dir", str(tmp_path / "run"),
        "--model.name_or_path", str(tiny_model),
        "--model.dtype", "float32",
        "--data.train", str(pairs_file),
        "--data.cache_dir", str(tmp_path / "tokenized"),
        "--reference.cache_dir", str(tmp_path / "reference"),
    ]  # fmt: skip


def refused(capsys: pytest.CaptureFixture[str], command: str, arguments: list[str]) -> str:
    """Runs a command that must be refused; returns its message."""
    assert run([command, *arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("dpo: error: ")
    assert "Traceback" not in message
    return message


def test_a_valid_command_line_passes_the_check(arguments: list[str]) -> None:
    assert run(["check", *arguments]) == 0


def test_a_missing_config_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.yaml: No such file" in refused(capsys, "train", ["--config", "nowhere.yaml"])


def test_a_malformed_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("model: [unclosed")
    assert "not YAML" in refused(capsys, "train", ["--config", str(tmp_path / "c.yaml")])


def test_all_problems_of_a_config_are_shown_at_once(
    capsys: pytest.CaptureFixture[str], arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text("train: {learning_rat: 1.0, seed: many}\nlos: {beta: 0.1}\n")
    message = refused(capsys, "train", ["--config", str(tmp_path / "c.yaml"), *arguments])
    assert "3 problems" in message
    assert "did you mean train.learning_rate?" in message
    assert "train.seed: 'many'" in message
    assert "loss" in message


def test_a_model_folder_that_does_not_exist(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    message = refused(capsys, "check", [*arguments, "--model.name_or_path", "./no/such/model"])
    assert "model.name_or_path: ./no/such/model does not exist" in message


def test_a_broken_line_is_named_by_file_and_number(
    capsys: pytest.CaptureFixture[str], arguments: list[str], tmp_path: Path
) -> None:
    good = json.dumps({"prompt": "a", "chosen": " b", "rejected": " c"})
    (tmp_path / "broken.jsonl").write_text("\n".join([good] * 16 + ["{not json"] + [good] * 3) + "\n")
    message = refused(capsys, "precompute-ref", [*arguments, "--data.train", str(tmp_path / "broken.jsonl")])
    assert "broken.jsonl" in message
    assert "17" in message


FAULTY = [
    {"prompt": "a", "chosen": " b"},
    {"prompt": "a", "chosen": "", "rejected": " c"},
    {"prompt": "a", "chosen": 3, "rejected": " c"},
    {"prompt": "a", "chosen": " b", "rejected": " b"},
]


def test_faulty_rows_are_dropped_and_counted_by_reason(
    capsys: pytest.CaptureFixture[str], arguments: list[str], tmp_path: Path
) -> None:
    rows = [*FAULTY, {"prompt": "a", "chosen": " b", "rejected": " c"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["precompute-ref", *arguments, "--data.train", str(tmp_path / "rows.jsonl")]) == 0
    output = capsys.readouterr().out
    assert "train: 1 pairs of 1 prompts" in output
    for reason in ("missing_field", "empty_completion", "not_text", "identical_completions"):
        assert f"1 dropped/{reason}" in output


def test_strict_makes_a_faulty_row_an_error(
    capsys: pytest.CaptureFixture[str], arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(FAULTY[1]) + "\n")
    message = refused(
        capsys, "check", [*arguments, "--data.train", str(tmp_path / "rows.jsonl"), "--data.strict", "true"]
    )
    assert "rows.jsonl" in message


def test_nothing_left_after_filtering(
    capsys: pytest.CaptureFixture[str], arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in FAULTY))
    message = refused(capsys, "check", [*arguments, "--data.train", str(tmp_path / "rows.jsonl")])
    assert "nothing left after filtering" in message
    assert "1 identical_completions" in message


def test_an_unrelated_output_folder_is_left_alone(
    capsys: pytest.CaptureFixture[str], arguments: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert "not empty and not a run" in refused(capsys, "train", arguments)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_evaluation_before_training(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert "run train first" in refused(capsys, "evaluate", arguments)


def test_a_length_above_the_models_positions(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert "positions" in refused(capsys, "precompute-ref", [*arguments, "--data.max_length", "100000"])


def test_data_prep_refuses_a_missing_file_and_a_full_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert data_prep(["hh", str(tmp_path / "none.jsonl"), "--output", str(tmp_path / "out")]) == 2
    assert "none.jsonl" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert data_prep(["stories", "--output", str(tmp_path / "out")]) == 2
    assert str(tmp_path / "out") in capsys.readouterr().err


def test_the_process_exits_with_2_and_prints_one_line() -> None:
    command = [sys.executable, "-m", "dpo", "train", "--config", "nowhere.yaml"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert len(result.stderr.strip().splitlines()) == 1
