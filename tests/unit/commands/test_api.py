"""The Python interface, as the README shows it, and the checks of a configuration that is made in Python."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dpo
from dpo.cli.main import run

README = (Path(__file__).parents[3] / "README.md").read_text()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def shown(language: str) -> str:
    """The one block of the README in a language."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return str(block)


@pytest.fixture
def reader_folder(
    make_chat_model: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """What the README's example needs: a chat model of that name, rows like its row, mine.yaml."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    make_chat_model(Path(MODEL))
    for file, words in {
        "pairs.jsonl": ("sky", "sea", "sun", "day"),
        "held_out.jsonl": ("cat", "mat"),
    }.items():
        Path(file).write_text("".join(shown("json").replace("sky", word) for word in words))
    Path("mine.yaml").write_text(shown("yaml"))
    Path("my_scores.py").write_text(
        "def length(prompts, completions):\n    return [*map(len, completions)]\n"
    )
    return tmp_path


def test_names_load_no_torch() -> None:
    code = "import sys, dpo; dpo.Config; print('torch' in sys.modules, dpo.__version__)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", dpo.__version__]
    assert all(getattr(dpo, name) is not None for name in dpo.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Trainer'"):
        dpo.Trainer  # noqa: B018


@pytest.mark.usefixtures("reader_folder")
def test_the_lines_of_the_readme_train_and_evaluate() -> None:
    names: dict[str, Any] = {}
    with pytest.raises(dpo.UserError, match=r"evaluate\.completion_tokens: 64; the model has 64 positions"):
        exec(shown("python"), names)  # trains; our tiny model has no room for 64 tokens
    names["config"] = replace(
        names["config"], evaluate=replace(names["config"].evaluate, completion_tokens=8)
    )
    names["experiment"] = dpo.Experiment(names["config"])
    names["summary"] = names["experiment"].evaluate()
    accuracy = "eval/rewards/accuracies"
    assert names["metrics"][accuracy] == names["summary"][accuracy]
    assert names["summary"]["score/policy"] > 0
    data = names["experiment"].open_data()
    assert (len(data.train), len(data.test)) == (4, 2)
    assert run(["train", "--config", "runs/mine/config.yaml", "--run_dir", "runs/again"]) == 0
    weights = [Path(f"runs/{name}/model/model.safetensors").read_bytes() for name in ("mine", "again")]
    assert weights[0] == weights[1]  # the command line does the same


@pytest.mark.usefixtures("reader_folder")
def test_the_configuration_of_the_readme_is_read_with_overrides() -> None:
    config = dpo.Experiment.read("mine.yaml", {"train.learning_rate": 5e-7}).config
    assert (config.model.name_or_path, config.train.learning_rate) == (MODEL, 5e-7)
    assert run(["check", "--config", "mine.yaml"]) == 0
    with pytest.raises(dpo.UserError, match=r"train\.learning_rat: unknown key; did you mean"):
        dpo.Experiment.read("mine.yaml", {"train.learning_rat": 1})


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
