"""The Python interface: the commands as functions, with the checks of the command line."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dpo
from dpo.cli.main import run

PYTHON = """
import dpo

config = dpo.Config(
    run_dir="runs/mine",
    model=dpo.ModelConfig(name_or_path="base", dtype="float32"),
    data=dpo.DataConfig(train="pairs.jsonl", test="held_out.jsonl"),
    train=dpo.TrainConfig(learning_rate=1e-3, pairs_per_step=4, checkpoint_every=3),
    evaluate=dpo.EvaluateConfig(num_prompts=4, completion_tokens=6, scorer="python:my_scores.length"),
)
experiment = dpo.Experiment(config)
data = experiment.open_data()
experiment.precompute_ref()
held_out = experiment.train()
summary = experiment.evaluate()
"""


def test_names_load_no_torch() -> None:
    code = "import sys, dpo; dpo.Config; print('torch' in sys.modules, dpo.__version__)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", dpo.__version__]
    assert all(getattr(dpo, name) is not None for name in dpo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        dpo.Trainer  # noqa: B018


def test_ten_lines_train_and_evaluate(
    tiny_model: Path,
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("base").symlink_to(tiny_model)
    write_jsonl(preference_rows(8), "pairs.jsonl")
    write_jsonl(preference_rows(6, seed=1), "held_out.jsonl")
    Path("my_scores.py").write_text(
        "def length(prompts, completions):\n    return [*map(len, completions)]\n"
    )
    names: dict[str, Any] = {}
    exec(PYTHON, names)
    assert len(names["data"].train) == 8
    assert names["held_out"]["eval/rewards/accuracies"] == names["summary"]["eval/rewards/accuracies"]
    assert names["summary"]["score/policy"] > 0
    command = ["--config", "runs/mine/config.yaml", "--run_dir", "runs/again"]
    assert run(["train", *command]) == 0  # the same run by the command line
    weights = [Path(f"runs/{name}/model/model.safetensors").read_bytes() for name in ("mine", "again")]
    assert weights[0] == weights[1]
    assert names["experiment"].train() == {}  # it had finished


def test_a_configuration_made_in_python_is_checked_like_a_file(
    make_config: Callable[..., dpo.Config],
) -> None:
    good = make_config("pairs.jsonl")
    wrong: dict[str, dpo.Config] = {
        "train.learning_rate: 'slow'": replace(good, train=replace(good.train, learning_rate="slow")),  # type: ignore[arg-type]
        "train.learning_rate: 0": replace(good, train=replace(good.train, learning_rate=0.0)),
        "run_dir: ": replace(good, run_dir=Path("runs")),  # type: ignore[arg-type]
        "loss.type: dpo": replace(good, loss=replace(good.loss, type="dpo")),
    }
    for said, config in wrong.items():
        with pytest.raises(dpo.UserError, match=said):
            dpo.Experiment(config)
    as_text = replace(good, train=replace(good.train, learning_rate="1e-6"))  # type: ignore[arg-type]
    assert dpo.Experiment(as_text).config == replace(good, train=replace(good.train, learning_rate=1e-6))


def test_a_file_is_read_with_overrides(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model: {name_or_path: base}\ndata: {train: pairs.jsonl}\n")
    config = dpo.Experiment.read(file, {"train.learning_rate": 5e-7, "loss.type": ["sigmoid", "ipo"]}).config
    assert (config.train.learning_rate, config.loss.type) == (5e-7, ["sigmoid", "ipo"])
    with pytest.raises(dpo.UserError, match=r"train\.learning_rat: unknown key; did you mean"):
        dpo.Experiment.read(file, {"train.learning_rat": 1})
