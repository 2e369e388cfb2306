"""What this process says of its world before a model is there."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo.config import ModelConfig, OptimizationConfig
from dpo.engine import world
from dpo.errors import UserError


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_alone_a_policy_is_on_one_device_and_nothing_is_cast(tiny_model: Path, dtype: Any) -> None:
    assert world.start(ModelConfig(name_or_path=str(tiny_model), dtype=dtype)).mixed_precision == "no"
    assert world.kind_here() == "one device"


def test_a_deepspeed_file_that_owns_our_numbers_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"gradient_clipping": 3.0, "zero_optimization": {"stage": 2}}')
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(UserError, match="gradient_clipping"):
        world.start(ModelConfig(name_or_path="m"))


def test_deterministic_kernels_are_asked_for_by_the_option_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    asked: list[bool] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    world.make_repeatable(OptimizationConfig())
    assert asked == []
    world.make_repeatable(OptimizationConfig(deterministic=True))
    assert asked == [True]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
