import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo.cli.main import run

Planned = Callable[..., dict[str, Any]]
"""Runs `dpo plan --json`: plan(model, *more, gpus=8, memory="80GB")."""


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
    def make(model: Path, *more: str, gpus: int = 8, memory: str = "80GB") -> dict[str, Any]:
        arguments = ["plan", "--num_gpus", str(gpus), "--gpu_memory", memory, "--json", *more]
        arguments += ["--model.name_or_path", str(model)]
        arguments += [] if "--data.train" in more else ["--data.train", str(pairs_file)]
        arguments += ["--data.cache_dir", str(tmp_path / "tokenized")]
        status = run([*arguments, "--reference.cache_dir", str(tmp_path / "reference")])
        printed = capsys.readouterr()
        assert status == 0, printed.err
        return dict(json.loads(printed.out))

    return make
