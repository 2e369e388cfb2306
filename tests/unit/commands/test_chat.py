"""dpo chat: two models at one prompt, with a memory where there is a chat template."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo.cli.main import run
from dpo.config import Config, resolved


@pytest.fixture
def finished(make_config: Callable[..., Config], tiny_model: Path, tmp_path: Path) -> Path:
    """A run folder whose policy is the reference."""
    config = make_config("pairs.jsonl")
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved(config)))
    (folder / "model").symlink_to(tiny_model)
    return folder


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def type_in(*lines: str) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))

    return type_in


def events(printed: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def said(printed: str) -> list[dict[str, Any]]:
    return [event for event in events(printed) if event["event"] == "chat"]


def test_equal_models_say_the_same_and_a_seed_repeats_it(
    finished: Path,
    typed: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DPO_OUTPUT", "")
    typed("the cat sat", "the cat sat", "/seed 0", "the cat sat", "/nonsense", "")
    assert run(["chat", str(finished), "--tokens", "8", "--json_lines"]) == 0
    printed = capsys.readouterr().out
    answers = said(printed)
    assert len(answers) == 3
    assert all(answer["reference"] == answer["policy"] for answer in answers)
    assert answers[0] == answers[2] != answers[1]
    assert "/nonsense: expected /reset or /seed N" in printed


def test_a_conversation_is_remembered_until_reset(
    finished: Path,
    make_chat_model: Callable[[Path], Path],
    tmp_path: Path,
    typed: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DPO_OUTPUT", "")
    folder = make_chat_model(tmp_path / "chat_model")
    settings = yaml.safe_load((finished / "config.yaml").read_text())
    settings["model"]["name_or_path"] = str(folder)
    (finished / "config.yaml").write_text(yaml.safe_dump(settings))
    typed("a day", "/seed 0", "a day", "/reset", "/seed 0", "a day")
    assert run(["chat", str(finished), "--tokens", "4", "--json_lines"]) == 0
    first, second, third = said(capsys.readouterr().out)
    assert first["reference"] == third["reference"] != second["reference"]
    typed("a day " * 40, "a day")
    assert run(["chat", str(finished), "--tokens", "4", "--json_lines"]) == 0
    printed = capsys.readouterr().out
    assert "do not fit the model's 64 positions" in printed
    assert len(said(printed)) == 1  # what does not fit is not remembered


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "expected one run folder, got none"),
        (["nowhere"], "nowhere: no config.yaml"),
        (["{run}", "--tokens", "0"], "--tokens: 0; expected at least 1"),
        (["{run}", "--temprature", "1"], "expected one run folder, got {run} --temprature 1"),
    ],
)
def test_what_is_wrong_is_said(
    finished: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], problem: str
) -> None:
    given = [argument.format(run=finished) for argument in arguments] or ["--seed", "0"]
    assert run(["chat", *given]) == 2
    assert problem.format(run=finished) in capsys.readouterr().err
