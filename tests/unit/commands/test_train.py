"""The commands in one process, on a mixture of rows as public data sets have them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from unit.data.test_conversations import ROW
from unit.data.test_layouts import CHATS

from dpo.cli.main import run


@pytest.fixture
def chat_model(make_chat_model: Callable[[Path], Path], tmp_path: Path) -> Path:
    return make_chat_model(tmp_path / "model")


def test_two_steps_on_every_layout_and_on_completions_of_several_messages(
    chat_model: Path, tmp_path: Path
) -> None:
    rows = {name: row for name, (row, _) in CHATS.items()} | {"several messages": ROW}
    sources = []
    for number, row in enumerate(rows.values()):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row))
        sources.append({"path": str(path), "weight": 2.0})
    config = tmp_path / "c.yaml"
    config.write_text(
        json.dumps(
            {
                "run_dir": str(tmp_path / "run"),
                "model": {"name_or_path": str(chat_model), "dtype": "float32"},
                "data": {"train": sources, "max_length": 64, "cache_dir": str(tmp_path / "tokenized")},
                "reference": {"cache_dir": str(tmp_path / "reference")},
                "train": {"pairs_per_step": len(rows), "num_epochs": 1, "learning_rate": 1e-3},
            }
        )
    )
    assert run(["check", "--config", str(config)]) == 0
    assert not (tmp_path / "tokenized").exists() or not [*(tmp_path / "tokenized").glob("*/counts.json")]
    assert run(["check", "--exact", "--config", str(config)]) == 0
    (tokenized,) = (tmp_path / "tokenized").glob("*/counts.json")  # training finds it
    for command in ("precompute-ref", "train"):
        assert run([command, "--config", str(config)]) == 0
    assert [*(tmp_path / "tokenized").glob("*/counts.json")] == [tokenized]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert len(steps) == 2
    assert steps[0]["train/loss"] == pytest.approx(0.693147, abs=1e-6)
    assert steps[1]["train/loss"] < steps[0]["train/loss"]
