"""Fixtures of the tests of models."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from unit.model.local_model import Edited, model_config

from dpo.config import ModelConfig


@pytest.fixture
def edited(tiny_model: Path, tmp_path: Path) -> Edited:
    """A copy of the tiny model that a test may damage."""

    def edit(change: Callable[[Path], Any]) -> ModelConfig:
        folder = tmp_path / "edited"
        shutil.copytree(tiny_model, folder)
        change(folder)
        return model_config(folder)

    return edit
