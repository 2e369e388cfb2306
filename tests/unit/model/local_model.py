"""The configuration of a model in a folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpo.config import ModelConfig

Edited = Callable[[Callable[[Path], Any]], ModelConfig]
"""A change to a folder -> the configuration of a model in a copy that has it."""


def model_config(folder: Path | str) -> ModelConfig:
    return ModelConfig(name_or_path=str(folder), dtype="float32")
