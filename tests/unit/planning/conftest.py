import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo.cli.main import run

Planned = Callable[..., dict[str, Any]]
"""Runs `dpo plan --json`: plan(model, *more, gpus=8, memory="80GB", data=())."""


@pytest.fixture
def described(tiny_model: Path, tmp_path: Path) -> Callable[..., Path]:
    """Makes a model's folder without weights: a config.json, and the tiny model's tokenizer."""

    def make(name: str, **config: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / file).write_bytes((tiny_model / file).read_bytes())
        return folder

    return make


@pytest.fixture
def plan(tmp_path: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]) -> Planned:
    def make(
        model: Path, *more: str, gpus: int = 8, memory: str = "80GB", data: Sequence[str] = ()
    ) -> dict[str, Any]:
        arguments = ["plan", "--num_gpus", str(gpus), "--gpu_memory", memory, "--json", *more]
        arguments += ["--model.name_or_path", str(model)]
        arguments += [] if "--data.train" in more else ["--data.train", str(pairs_file)]
        arguments += ["--data.cache_dir", str(tmp_path / "tokenized")]
        status = run([*arguments, "--reference.cache_dir", str(tmp_path / "reference"), *data])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return dict(json.loads(printed.out))

    return make


@pytest.fixture
def long_steps(tmp_path: Path) -> tuple[str, ...]:
    """Arguments for steps in which every GPU has more tokens than a micro-batch: 512 pairs of 1,024."""
    rows = [
        {"prompt": f"{n} " + "mat " * 160, "chosen": "good " * 160, "rejected": "bad " * 160}
        for n in range(512)
    ]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("--data.train", str(file), "--train.pairs_per_step", "512")
