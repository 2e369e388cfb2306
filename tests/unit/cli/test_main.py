"""The command line: what it refuses and in which words, its exit status, and that help needs no torch."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from unit.cli.refusals import REQUIRED

from dpo.cli import main as cli


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "experiment.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian"], "dpo: error: no command trian; did you mean train?; see dpo --help"),
        (["check", "zzqq"], "dpo: error: no command zzqq; see dpo --help"),
        (["train"], "dpo: error: 2 problems in the configuration:"),
        (["train", "--config", "/no/such.yaml"], "dpo: error: --config: /no/such.yaml:"),
        (["check", *REQUIRED[:2], "--data.train", "/no/data"], "dpo: error: data.train: /no/data does not"),
    ],
)
def test_bad_usage_is_one_message_and_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(said)
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_no_command_shows_the_usage_and_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == 2
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage for name in ("sft", "precompute-ref", "train", "evaluate", "check"))
    assert cli.run(["--help"]) == 0
    assert capsys.readouterr().out == usage


def test_a_refused_run_leaves_its_status_in_the_run_folder(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["--model.name_or_path", "/no/model", "--data.train", "/no/data", "--run_dir", str(run_dir)]
    assert cli.run(["evaluate", *arguments]) == 2
    record = json.loads((run_dir / "exit.json").read_text())
    assert (record["command"], record["status"], record["step"]) == ("evaluate", 2, 0)
    assert str(run_dir) in record["message"]


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    arguments = ["--model.name_or_path", "/no/model", "--data.train", "/no/data", "--run_dir", str(tmp_path)]
    assert cli.run(["evaluate", *arguments]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_checking_writes_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert cli.run(["check", "train", *REQUIRED[:2], "--data.train", "/no/d", "--run_dir", str(run_dir)]) == 2
    assert not run_dir.exists()


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["sft", "-h"]])
def test_help_answers_within_a_second_and_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['dpo', *sys.argv[1:]]\n"
        "import dpo.__main__ as program\n"
        "try:\n    program.main()\n"
        "except SystemExit as ended:\n    assert ended.code == 0, ended.code\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'pyarrow', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # processor time: other work on the machine makes the wall clock slower, not this
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1
    assert "usage: dpo" in done.stdout
    if len(arguments) > 1:
        assert "--train.learning_rate" in done.stdout


@pytest.mark.parametrize("word", ["--local_rank=0", "--local-rank=0"])
def test_the_deepspeed_launchers_argument_is_named(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["train", word, "--config", "x.yaml"]) == 2
    said = capsys.readouterr().err
    assert "--local_rank" in said
    assert "accelerate launch" in said
