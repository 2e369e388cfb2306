"""The command line: what it refuses and in which words, its exit status, and that help needs no torch."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from unit.cli.refusals import REQUIRED

from dpo import terminal
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


def test_every_answer_is_json_where_lines_of_json_are_asked_for(
    tiny_model: Path,
    tmp_path: Path,
    pairs_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Also of the commands that have options of their own, and each ends with its status."""
    monkeypatch.setenv(terminal.OUTPUT, "")  # restored afterwards
    config = tmp_path / "c.yaml"
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(tiny_model), "dtype": "float32"},
        "data": {"train": str(pairs_file), "cache_dir": str(tmp_path / "tokenized")},
        "reference": {"cache_dir": str(tmp_path / "reference")},
    }
    config.write_text(json.dumps(settings))
    given = ["--config", str(config), "--json_lines"]
    theirs = tmp_path / "theirs.yaml"
    theirs.write_text("beta: 0.1\n")
    commands = {
        "check": ["check", *given],
        "summary": ["precompute-ref", *given],
        "cache": ["cache", "info", *given],
        "verified": ["cache", "verify", *given],
        "pruned": ["cache", "prune", *given, "--dry_run"],
        "plan": ["plan", *given, "--num_gpus", "1", "--gpu_memory", "8"],
    }
    for kind, arguments in commands.items():
        capsys.readouterr()
        assert cli.run(arguments) == 0
        named = "train" if kind == "check" else arguments[0]  # what was checked for
        events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert kind in [event["event"] for event in events]
        assert events[-1] == {"event": "end", "command": named, "status": 0, "message": "done"}
    assert cli.run(["convert", str(theirs), "--output", str(tmp_path / "ours.yaml"), "--json_lines"]) == 0
    assert [json.loads(line)["event"] for line in capsys.readouterr().out.splitlines()] == ["summary", "end"]
    assert cli.run(["cache", "info", "--quiet", "--config", str(config)]) == 0
    assert f"model     {tiny_model} (gpt2, float32)" in capsys.readouterr().out
