"""Scorers that users bring: a function of theirs, a program of theirs, and what is refused."""

import sys
from pathlib import Path

import pytest

from dpo.config import SCORER_KINDS
from dpo.errors import UserError
from dpo.evaluate.asked import Asked
from dpo.evaluate.scoring import SCORERS, load_scorer

PROMPTS, COMPLETIONS = [Asked("one"), Asked("three")], ["a", "a b c\nd"]
MODULE = """
def words(prompts, completions):
    return [len(text.split()) - len(prompt) for prompt, text in zip(prompts, completions)]

def short(prompts, completions):
    return [1.0]

def nothing(prompts, completions):
    return None

def unknown(prompts, completions):
    return [float("nan")] * len(prompts)

number = 3
"""
PROGRAM = """
import json, sys
for line in sys.stdin:
    row = json.loads(line)
    print(len(row["completion"].split()) - len(row["prompt"]))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_scores.py").write_text(MODULE)
    (tmp_path / "my_scores_program.py").write_text(PROGRAM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_scores", raising=False)
    return tmp_path


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "name", ["python:my_scores.words", f"command:{sys.executable} my_scores_program.py"], ids=["py", "cmd"]
)
def test_a_scorer_of_ones_own_sees_prompts_and_completions(name: str) -> None:
    scorer = load_scorer(name)
    assert scorer.name == name
    assert scorer.score(PROMPTS, COMPLETIONS) == [-2.0, -1.0]
    assert scorer.is_positive(0.1)
    assert not scorer.is_positive(0.0)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("python:my_scores.missing", "my_scores.*no attribute 'missing'.*expected module.function"),
        ("python:no_such_module.words", "No module named 'no_such_module'"),
        ("python:words", "expected module.function"),
        ("python:my_scores.number", "a int; expected a function"),
        ("python:my_scores.short", "1 scores for 2 texts"),
        ("python:my_scores.nothing", "expected 2 numbers"),
        ("python:my_scores.unknown", "not finite"),
        ("command:./no_such_program", "no such program"),
        ("command:sh -c 'echo", "No closing quotation"),
        ("command:sh -c 'echo broken >&2; exit 3'", "status 3: broken"),
        ("command:sh -c 'echo good'", "expected one number a line"),
        ("command:sh -c 'echo 1'", "1 scores for 2 texts"),
    ],
)
def test_what_is_wrong_with_a_scorer_is_one_error(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_scorer(name).score(PROMPTS, COMPLETIONS)


def test_the_configuration_takes_what_can_be_loaded() -> None:
    assert {*SCORERS} == {*SCORER_KINDS}
