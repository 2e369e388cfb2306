"""Memory and traffic of one real rank in training, to compare with the prediction of `dpo plan`.

Runs as a rank, started by a launcher or a test; tensor storages are counted. `Planned.of` must
run in the parent process: under ZeRO-3, transformers would shard the rehearsed model too.
"""

import argparse
import gc
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import deepspeed
import numpy as np
import torch
from accelerate.state import AcceleratorState
from deepspeed.comm.comm import comms_logger

from dpo import distributed
from dpo.config import LoraConfig, ModelConfig, OptimizationConfig
from dpo.data.trees import Tree, tree_batch
from dpo.engine import world
from dpo.engine.engine import Engine
from dpo.model.load import DTYPES, load_config
from dpo.model.lora import empty_policy, load_policy
from dpo.planning.live_bytes import LiveBytes
from dpo.planning.memory import Name, Shape, rank_memory, shape_of
from dpo.planning.rehearsal import Rehearsal, rehearse
from dpo.planning.traffic import Traffic, traffic

STEPS, MICRO_BATCHES = 2, 2


def main(arguments: list[str] | None = None) -> None:
    """Trains two steps of two micro-batches on trees of one size, and reports the second step per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", required=True, nargs="+", help="model folders, one after the other")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--trees", type=int, default=1, help="trees per micro-batch")
    parser.add_argument("--gradient_checkpointing", choices=["full", "selective"], default=False)
    parser.add_argument("--lora_rank", type=int, help="train only an adapter of this rank")
    parser.add_argument("--quantization", choices=["nf4", "int8"], help="of the frozen base of an adapter")
    parser.add_argument("--output", type=Path, required=True, help="file for the numbers")
    args = parser.parse_args(arguments)
    measured = {}
    for name in args.models:
        AcceleratorState._reset_state()  # otherwise the next model gets this one's buckets
        config = ModelConfig(
            name_or_path=name,
            dtype=args.dtype,
            gradient_checkpointing=args.gradient_checkpointing,
            quantization=args.quantization,
            lora=LoraConfig(rank=args.lora_rank) if args.lora_rank else None,
        )
        measured[name] = measure(config, some_trees(args.trees))
        gc.collect()
    if distributed.is_main():
        args.output.write_text(json.dumps(measured))


def some_trees(number: int) -> list[Tree]:
    """Trees of 96 tokens each."""
    return [(np.zeros(48, dtype=np.int32), [np.zeros(24, dtype=np.int32)] * 2) for _ in range(number)]


def measure(config: ModelConfig, trees: list[Tree]) -> dict[str, Any]:
    """Bytes of this rank after loading, at the peak while loading, and between steps; at the peak of a step
    those of the rank that needs most; and this rank's messages to each kind of collective in a step, as
    DeepSpeed's communication logger counts them.
    """
    live = LiveBytes()
    with live:
        accelerator = world.start(config)
        model = load_policy(config, dtype=DTYPES[config.dtype], seed=0)
        live.count(model.parameters())
        policy = Engine(accelerator, model, config, OptimizationConfig(learning_rate=1e-6))
        gc.collect()
        loaded, loading = live.now, live.peak
        batch = tree_batch(trees, policy.layout)
        if policy.kind.startswith("DeepSpeed"):
            deepspeed.comm.configure(enabled=True, prof_all=True, verbose=False, debug=False)
        for _ in range(STEPS):
            live.peak = live.now
            comms_logger.reset_data()
            for number in range(MICRO_BATCHES):
                last = number == MICRO_BATCHES - 1
                policy.accumulate(policy.score(batch).sum() * 1e-3, last=last)
            policy.update(1e-6)
    sent = {
        name: sum(size * record[0] for size, record in sizes.items())
        for name, sizes in comms_logger.get_raw_data().items()
    }
    peak = max(distributed.gather_objects(live.peak))  # the last rank has gradients of its own first
    return {"loaded": loaded, "loading": loading, "kept": live.now, "peak": peak, "sent": sent}


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What `dpo plan` knows of a model and its micro-batch, from which it predicts for any sharding."""

    shape: Shape
    step: Rehearsal
    dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, trees: list[Tree]) -> "Planned":
        """Rehearses a micro-batch of these trees.

        Args:
            config: The model, its compute type, and what is recomputed.
            trees: As `measure` is given.
        """
        described, dtype = load_config(config), DTYPES[config.dtype]
        with torch.device("meta"):
            bare = empty_policy(described, config, dtype=dtype)
        step = rehearse(described, config, trees, dtype=dtype, gpu=False)
        return cls(shape=shape_of(bare, quantization=config.quantization), step=step, dtype=dtype)

    def memory(self, sharding: Name, world_size: int) -> dict[str, int]:
        """Bytes that this rank needs, by component, and the total."""
        memory = rank_memory(
            sharding, self.shape, self.step, world_size=world_size, dtype=self.dtype, state_bytes=8
        )
        return {**asdict(memory), "total": memory.total + memory.host, "parameters": self.shape.parameters}

    def messages(self, sharding: Name, world_size: int) -> Traffic:
        """What this rank gives to each kind of collective in a step."""
        return traffic(
            sharding, self.shape, world_size=world_size, dtype=self.dtype, micro_batches=MICRO_BATCHES
        )


if __name__ == "__main__":
    main()
    os._exit(0)  # threads of the communication library may outlive the interpreter
