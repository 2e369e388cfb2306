"""A loss of the user's own: python:module.function."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo.cli.main import run
from dpo.cli.validate import problems
from dpo.config import Config, LossConfig

MODULE = """
import torch

def plain(pairs, loss):
    return -torch.nn.functional.logsigmoid(loss.beta * pairs.margins)

number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_losses.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    return tmp_path


@pytest.mark.usefixtures("here")
def test_a_loss_of_ones_own_trains_as_the_same_one_of_the_table(
    tiny_model: Path,
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., list[dict[str, Any]]],
) -> None:
    data, held_out = write_jsonl(preference_rows(8), "p.jsonl"), write_jsonl(preference_rows(4), "h.jsonl")
    keys = [
        "--model.name_or_path", str(tiny_model), "--model.dtype", "float32", "--data.train", data,
        "--data.test", held_out, "--train.pairs_per_step", "4", "--train.learning_rate", "1e-3",
    ]  # fmt: skip
    assert run(["precompute-ref", *keys]) == 0
    weights = []
    for number, name in enumerate(("sigmoid", "python:my_losses.plain")):
        assert run(["train", *keys, "--loss.type", name, "--run_dir", f"run_{number}"]) == 0
        weights.append(Path(f"run_{number}/model/model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert "python:my_losses.plain" in Path("run_1/model/README.md").read_text()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("python:my_losses.missing", "no attribute 'missing'; expected module.function"),
        ("python:no_such_module.f", "No module named 'no_such_module'"),
        ("python:my_losses.number", "my_losses.number is a int; expected a function"),
        ("pyton:my_losses.plain", "expected one of sigmoid"),
    ],
)
def test_a_loss_that_does_not_exist_is_said_before_anything_starts(
    make_config: Callable[..., Config], name: str, said: str
) -> None:
    config = replace(make_config("pairs.jsonl"), loss=LossConfig(type=["sigmoid", name]))
    assert any(said in problem for problem in problems(config))
