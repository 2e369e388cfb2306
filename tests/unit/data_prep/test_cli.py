import importlib
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.cli import SOURCES, main

HEAVY = ("torch", "transformers", "datasets", "deepspeed")


@pytest.mark.parametrize(
    "arguments", [["--help"], ["hh", "--help"], ["labels", "--help"], ["stories", "--help"]]
)
def test_help_answers_in_under_a_second(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "data_prep", *arguments]
    seconds = []
    for _ in range(3):  # the fastest of three: other tests may use the cores
        start = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds.append(time.monotonic() - start)
        assert done.stdout.startswith("usage: data_prep")
        if seconds[-1] < 1:
            break
    assert min(seconds) < 1


def test_help_names_every_source(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_has_what_the_command_line_calls(name: str) -> None:
    module = importlib.import_module(f"data_prep.{name}")
    assert "\n" not in module.SUMMARY
    assert callable(module.add_arguments)
    assert callable(module.run)


def test_only_the_chosen_source_is_imported() -> None:
    code = (
        "import sys; from data_prep.cli import main; "
        "main(['preferences', 'missing.jsonl', '--output', 'out']); "
        "print(*(name for name in sys.modules if name.startswith('data_prep.')), "
        f"*(name for name in {HEAVY} if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = ["cli", "files", "preferences", "relabel", "splits"]
    assert sorted(done.stdout.split()) == [f"data_prep.{module}" for module in modules]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["storeys", "--output", "out"],
        ["stories"],
        ["labels", "--task", "joy", "--output", "out"],
        ["hh", "x.jsonl", "--output", "out", "--test_fraction", "1"],
        ["hh", "x.jsonl", "--output", "out", "--max_rows", "0"],
        *(["hh", "x.jsonl", "--output", "out", "--fold", fold] for fold in ("0/5", "6/5", "1/1", "2", "a/b")),
        ["hh", "x.jsonl", "--output", "out", "--fold", "1/5", "--test_fraction", "0.2"],
        ["stories", "--output", "out", "--strict"],  # this source reads no rows
    ],
)
def test_bad_usage_exits_with_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_a_missing_input_is_one_line_on_stderr_and_status_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "data_prep", "hh", "./missing.jsonl", "--output", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("data_prep: error: input: ./missing.jsonl does not exist; expected")
    assert done.stderr.count("\n") == 1
