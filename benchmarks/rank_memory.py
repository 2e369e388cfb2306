"""What one real rank allocates in training, counted by storages, beside what `dpo plan` says it will.

To be started as a rank, by a launcher or a test. `predict` is for the parent: with ZeRO-3 switched on,
transformers would shard the rehearsed model too.
"""

import argparse
import gc
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from dpo import distributed, engine
from dpo.config import ModelConfig, OptimizationConfig
from dpo.data.trees import Tree, tree_batch
from dpo.engine import Engine
from dpo.model.load import empty_model, load_config, load_model
from dpo.planning.live import LiveBytes
from dpo.planning.memory import Name, rank_memory, shape_of, weight_dtype
from dpo.planning.rehearsal import rehearse

STEPS, MICRO_BATCHES = 2, 2


def main(arguments: list[str] | None = None) -> None:
    """Trains two steps of two micro-batches on trees of one size and reports the second."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a model folder")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--trees", type=int, default=1, help="trees of a micro-batch")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--output", type=Path, required=True, help="file for the numbers of rank 0")
    args = parser.parse_args(arguments)
    config = ModelConfig(
        name_or_path=args.model, dtype=args.dtype, gradient_checkpointing=args.gradient_checkpointing
    )
    measured = measure(config, some_trees(args.trees))
    if distributed.is_main():
        args.output.write_text(json.dumps(measured))


def some_trees(number: int) -> list[Tree]:
    """Trees of 96 tokens."""
    return [(np.zeros(48, dtype=np.int32), [np.zeros(24, dtype=np.int32)] * 2) for _ in range(number)]


def measure(config: ModelConfig, trees: list[Tree]) -> dict[str, int]:
    """Bytes of this rank: after loading, most while loading, between steps, and most in a step."""
    live = LiveBytes()
    with live:
        accelerator = engine.start(config)
        model = load_model(config, dtype=engine.weight_dtype(accelerator, config))
        live.count(model.parameters())
        policy = Engine(accelerator, model, config, OptimizationConfig(learning_rate=1e-6))
        gc.collect()
        loaded, loading = live.now, live.peak
        batch = tree_batch(trees, policy.layout)
        for _ in range(STEPS):
            live.peak = live.now
            for number in range(MICRO_BATCHES):
                last = number == MICRO_BATCHES - 1
                policy.accumulate(policy.score(batch, last=last).sum() * 1e-3, last=last)
            policy.update(1e-6)
    return {"loaded": loaded, "loading": loading, "kept": live.now, "peak": live.peak}


def predict(config: ModelConfig, trees: list[Tree], sharding: Name, world_size: int) -> dict[str, int]:
    """What `dpo plan` expects of this rank, by component, and their sum."""
    described = load_config(config)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
    weights = weight_dtype(sharding, dtype)
    step = rehearse(described, config, trees, dtype=weights, autocast=weights != dtype, gpu=False)
    with torch.device("meta"):
        shape = shape_of(empty_model(described, config, dtype=weights))
    memory = rank_memory(sharding, shape, step, world_size=world_size, dtype=dtype, moments=2)
    return {**asdict(memory), "total": memory.total + memory.host, "parameters": shape.parameters}


if __name__ == "__main__":
    main()
    os._exit(0)  # threads of the communication library may outlive the interpreter
