import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


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
