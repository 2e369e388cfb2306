"""A tiny experiment: its configuration, its data in token ids, and hand-made adapters of its model."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dpo.config import Config, ModelConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.trees import TreeBatch
from dpo.engine.frozen import frozen_scorer
from dpo.reference import precompute as precompute_module
from dpo.reference.identity import ReferenceIdentity, reference_identity

Score = Callable[[TreeBatch], Tensor]
Around = Callable[[Callable[[int, Score, TreeBatch], Tensor]], None]


@pytest.fixture
def experiment(
    make_config: Callable[..., Config],
    open_data: Callable[[Config], TokenizedDataset],
    write_jsonl: Callable[..., str],
) -> Callable[[list[dict[str, Any]]], tuple[Config, TokenizedDataset]]:
    """(configuration, data in token ids) for rows of preference data."""

    def make(rows: list[dict[str, Any]]) -> tuple[Config, TokenizedDataset]:
        config = make_config(write_jsonl(rows))
        return config, open_data(config)

    return make


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to edit."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def identify(tmp_path: Path) -> Callable[..., ReferenceIdentity]:
    """identify(folder, dtype="float32"): the identity of the model in a folder."""

    def identify(folder: Path, **options: Any) -> ReferenceIdentity:
        model = ModelConfig(name_or_path=str(folder), **options)
        return reference_identity(model, tmp_path / "cache")

    return identify


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """A LoRA adapter of the tiny model as PEFT writes it: make_adapter("name", base, scale=0.1)."""

    def make(name: str, base: Path, *, scale: float = 0.1) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4}
        settings |= {
            "target_modules": ["c_attn"],
            "fan_in_fan_out": True,
            "base_model_name_or_path": str(base),
        }
        (folder / "adapter_config.json").write_text(json.dumps(settings))
        layers = "base_model.model.transformer.h.{}.attn.c_attn.lora_{}.weight"
        random = torch.Generator().manual_seed(0)
        weights = {layers.format(i, "A"): torch.randn(2, 32, generator=random) for i in range(2)}
        weights |= {layers.format(i, "B"): torch.randn(96, 2, generator=random) * scale for i in range(2)}
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(precompute_module, "frozen_scorer", refuse)


@pytest.fixture
def around_scorer(
    monkeypatch: pytest.MonkeyPatch,
) -> Around:
    """Puts a function between precompute and its model. It is called with the number of the batch, the
    model's own `score`, and the batch; calls that probe the layout go to the model directly.
    """

    def install(call: Callable[[int, Score, TreeBatch], Tensor]) -> None:
        @contextmanager
        def scorer(model: ModelConfig, *, sharded: bool) -> Iterator[Any]:
            numbers = iter(range(10**6))
            with frozen_scorer(model, sharded=sharded) as real:
                forward = real.forward

                def between(batch: TreeBatch, *, per_token: bool, **probing: bool) -> Tensor:
                    if probing:
                        return forward(batch, per_token=per_token, **probing)
                    return call(next(numbers), lambda rows: forward(rows, per_token=per_token), batch)

                monkeypatch.setattr(real, "forward", between)
                yield real

        monkeypatch.setattr(precompute_module, "frozen_scorer", scorer)

    return install
