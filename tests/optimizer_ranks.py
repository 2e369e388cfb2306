"""Three steps with every optimizer that a sharding allows; test_optimizers.py compares them."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate.state import AcceleratorState
from deepspeed.utils import safe_get_full_fp32_param

from dpo import distributed
from dpo.config import ModelConfig, OptimizationConfig
from dpo.data.trees import tree_batch
from dpo.engine import world
from dpo.engine.engine import Engine
from dpo.engine.optimizer import OPTIMIZERS
from dpo.errors import UserError
from dpo.model.load import load_model

STEPS, RATE, SEED = 3, 1e-3, 5
Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")


def options_of(name: str) -> OptimizationConfig:
    """The optimizer, with what is not its default."""
    return OptimizationConfig(optimizer=name, learning_rate=RATE, weight_decay=0.1, max_grad_norm=0.5)  # type: ignore[arg-type]


def measure(model: Path, folder: Path, dtype: Dtype) -> dict[str, Any]:
    """Optimizer -> loss and gradient norm of each step, the same after a resume, or why it is refused."""
    found: dict[str, Any] = {}
    for name in OPTIMIZERS:
        try:
            found[name] = {"straight": _steps(_engine(model, name, dtype), 0)}
        except UserError as refused:
            found[name] = str(refused)
            continue
        stopped, resumed = _engine(model, name, dtype), _engine(model, name, dtype)
        first = _steps(stopped, 0, until=STEPS - 1)
        place = folder / name
        if distributed.is_main():
            place.mkdir(parents=True)
        distributed.barrier()
        stopped.save(place)()
        distributed.barrier()
        resumed.load(place)
        found[name]["resumed"] = first + _steps(resumed, STEPS - 1)
    return found


def digests_of_masters(model: Path) -> dict[str, str]:
    """Weight -> digest of its master in bfloat16, dithered, before the first step."""
    engine, found = _engine(model, "adamw", "bfloat16"), dict[str, str]()
    engine.dither(SEED)
    for name, weight in engine.model.named_parameters():
        if hasattr(engine, "_masters"):
            master = engine._masters.of[weight]
        else:
            master = safe_get_full_fp32_param(weight)
        found[name] = hashlib.sha256(master.detach().contiguous().numpy().tobytes()).hexdigest()
    return found


def on_ranks(environments: list[Mapping[str, str]], model: Path, folder: Path) -> None:
    """One rank's work: `measure` under each sharding in each compute type; rank 0 writes the results."""
    for number, environment in enumerate(environments):
        os.environ.update(environment)
        AcceleratorState._reset_state()
        found = {dtype: measure(model, folder / str(number) / dtype, dtype) for dtype in DTYPES}
        found["masters"] = digests_of_masters(model)
        if distributed.is_main():
            (folder / f"{number}.json").write_text(json.dumps(found))


def _engine(folder: Path, name: str, dtype: Dtype) -> Engine:
    model = ModelConfig(name_or_path=str(folder), dtype=dtype)
    return Engine(world.start(model), load_model(model), model, options_of(name))


def _steps(engine: Engine, first: int, *, until: int = STEPS) -> list[list[float]]:
    """Loss and norm of steps over the same four sequences, shared by the ranks."""
    found = []
    for _ in range(first, until):
        ids = np.arange(40, dtype=np.int32).reshape(4, 10)
        own = [ids[number] for number in distributed.share_of(range(4))]
        loss = -engine.score(tree_batch([(row[:3], [row[3:]]) for row in own], engine.layout)).sum() / 4
        engine.accumulate(loss, last=True)
        norm = engine.update(RATE)
        total = distributed.sum_over_ranks(np.array([float(loss.detach())]))
        found.append([float(total[0]), norm])
    return found
