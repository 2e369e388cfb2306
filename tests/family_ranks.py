"""Two steps of tiny models of all kinds under each sharding; test_families.py compares them."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState

from dpo import distributed
from dpo.config import ModelConfig, OptimizationConfig
from dpo.data.trees import Tree, tree_batch
from dpo.engine import world
from dpo.engine.engine import Engine
from dpo.errors import UserError
from dpo.model.load import load_model
from dpo.model.probe_trees import trees_of
from dpo.train.routing import step_balance

STEPS, RATE, AUX_LOSS_WEIGHT = 2, 1e-3, 0.5
KINDS = {
    "llama": "packed",
    "gemma3": "packed",  # a vision tower that no text reaches
    "gemma4_text": "packed",  # heads that differ by layer
    "mixtral": "packed",  # experts, with their balancing loss
    "deepseek_v3": "packed",  # latent attention, biased routers
    "gpt_oss": "trees",  # sinks
    "bloom": "rows",  # ALiBi
    "mamba": "rows",  # no attention
    "granitemoehybrid": "rows",  # state-space layers and experts
    "lfm2": "rows",  # short convolutions
}
BALANCED = "mixtral"
IN_BFLOAT16 = ("deepseek_v3", "ernie4_5_moe", "llama")
"""Families with float32 buffers, with float32 weights, and with neither."""
RNG = np.random.default_rng(0)


def _ids(length: int) -> Any:
    return RNG.integers(3, 300, length).astype(np.int32)


TREES: list[Tree] = [(_ids(9), [_ids(20), _ids(6)]), (_ids(4), [_ids(3), _ids(7)])]


def measure(models: Path, out: Path) -> None:
    """Writes what each kind's steps gave, and its weights afterwards."""
    found: dict[str, Any] = {family: _train(models / family, family == BALANCED) for family in KINDS}
    found["bfloat16"] = {family: _in_bfloat16(models / family) for family in IN_BFLOAT16}
    if distributed.is_main():
        torch.save(found, out)
    distributed.barrier()


def on_ranks(environments: list[Mapping[str, str]], models: Path, out: Path) -> None:
    """One rank's work: `measure` under each sharding, into a file for each."""
    for number, environment in enumerate(environments):
        os.environ.update(environment)
        AcceleratorState._reset_state()
        measure(models, out / f"{number}.pt")


def _engine(config: ModelConfig) -> Engine:
    accelerator = world.start(config)
    options = OptimizationConfig(learning_rate=RATE, max_grad_norm=0.0)
    model = load_model(config)
    return Engine(accelerator, model, config, options)


def _train(folder: Path, balanced: bool) -> dict[str, Any]:
    weight = AUX_LOSS_WEIGHT if balanced else 0.0
    engine = _engine(ModelConfig(name_or_path=str(folder), dtype="float32", router_aux_loss_weight=weight))
    layout = engine.settle_layout(trees_of(*TREES)).layout
    steps = []
    for _ in range(STEPS):
        own = [TREES[number] for number in distributed.share_of(range(len(TREES)))]
        batch = tree_batch(own, engine.layout)
        with engine.routers.watching(batch) as routed:
            logps = engine.score(batch)
        loss = -logps.sum() / 100
        if balanced:
            loss = loss + weight * step_balance([routed]).part(routed)
        engine.accumulate(loss, last=True)
        norm = engine.update(RATE)
        total = distributed.sum_over_ranks(np.array([float(loss.detach())]))
        steps.append([float(total[0]), norm])
    return {"layout": layout, "steps": steps, "weights": engine.weights()}


def _in_bfloat16(folder: Path) -> Any:
    """Buffers after a step, and the exported weights; or why the model is refused."""
    try:
        engine = _engine(ModelConfig(name_or_path=str(folder)))
    except UserError as refused:
        return str(refused)
    batch = tree_batch(TREES, "rows")
    engine.accumulate(-engine.score(batch).sum() / 100, last=True)
    engine.update(RATE)
    in_training = {name: buffer for name, buffer in engine.model.named_buffers() if "bias" in name}
    return {"training": in_training, "exported": engine.weights()}
