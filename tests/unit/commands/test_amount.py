"""How much training a configuration is: said before and after."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo.cli.main import run
from dpo.commands.amount import FEW_STEPS, hardly_any, unusual_rate
from dpo.config import SftTrainConfig, TrainConfig


def test_a_handful_of_steps_is_named_with_what_would_make_more() -> None:
    said = hardly_any(1, TrainConfig(pairs_per_step=64, num_epochs=1, learning_rate=1e-6))
    assert said.startswith("hardly any training: 1 step of at most 64 pairs, at learning rate 1e-06")
    assert "lower train.pairs_per_step (64), or raise train.num_epochs (1)" in said
    assert "train.sequences_per_step (64)" in hardly_any(2, SftTrainConfig())


def test_enough_steps_or_a_number_that_was_asked_for_are_no_doubt() -> None:
    assert hardly_any(FEW_STEPS, TrainConfig()) == ""
    assert hardly_any(1, TrainConfig(max_steps=1)) == ""


def test_a_learning_rate_without_its_exponent_is_questioned() -> None:
    assert "as in 5e-7?" in unusual_rate(TrainConfig(learning_rate=5))
    assert unusual_rate(TrainConfig(learning_rate=0.02)) == ""  # of Muon


def test_the_first_hour_is_told_how_little_it_is(
    tiny_model: Path,
    tmp_path: Path,
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two keys and a few pairs: before the reference is computed, before training, and in the summary."""
    config = tmp_path / "c.yaml"
    settings = {
        "run_dir": str(tmp_path / "run"),
        "model": {"name_or_path": str(tiny_model)},  # bfloat16 by default
        "data": {
            "train": write_jsonl(preference_rows(6), "train.jsonl"),
            "test": write_jsonl(preference_rows(3, seed=1), "test.jsonl"),
            "cache_dir": str(tmp_path / "tokenized"),
        },
        "reference": {"cache_dir": str(tmp_path / "reference")},
        "evaluate": {"watched_prompts": 0},
    }
    config.write_text(json.dumps(settings))
    exact = ["--model.dtype", "float32"]
    for command, more in (("precompute-ref", []), ("precompute-ref", exact), ("train", exact)):
        assert run([command, "--config", str(config), *more]) == 0
        said = capsys.readouterr().out
        before = said[: said.index(f"\n{command}\n")]
        assert "hardly any training: 1 step of at most 64 pairs" in before
        assert ("bfloat16 on a CPU" in before) is (not more)
    box = said[len(before) :]
    assert "1 step of at most 64 pairs on train: " in box
    assert "hardly any training" in box
    num_pairs = sum(len(row["pairs"]) for row in preference_rows(3, seed=1))
    assert f" of {num_pairs} pairs\n" in box
    assert "only 3 prompts: the intervals are rough" in box
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "num_pairs" not in lines  # a count that never changes is no curve
