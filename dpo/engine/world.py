"""Joins the world that the launcher described: one `Accelerator` per process, and how it shards a policy."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, KwargsHandler
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from dpo import distributed
from dpo.config import ModelConfig, OptimizationConfig
from dpo.engine.deepspeed_config import offloads_optimizer, read_settings
from dpo.model.load import DTYPES


def start(model: ModelConfig) -> Accelerator:
    """The Accelerator of this process; to be made before the model is loaded, so that ZeRO-3 can shard it
    then.

    Without an accelerator the gloo backend must be named, or Accelerate believes that every rank is alone.
    """
    if (file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
        read_settings(Path(file))
    distributed.start()
    backend = None if torch.cuda.is_available() else "gloo"
    handlers: list[KwargsHandler] = []
    if distributed.is_distributed():
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=distributed.COLLECTIVE_TIMEOUT))
    mixed_precision = "bf16" if model.dtype == "bfloat16" else "no"
    cpu = distributed.is_distributed() and distributed.trains_on_cpu_alone()
    return Accelerator(mixed_precision=mixed_precision, kwargs_handlers=handlers, cpu=cpu)


def make_repeatable(options: OptimizationConfig) -> None:
    """On GPUs, kernels whose sums have one order, where the config asks for them."""
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)


def kind_here() -> str:
    """How a policy of this process will be sharded, once `start` has been called: `DeepSpeed ZeRO-2`, `DDP`
    or `one device`.
    """
    state = AcceleratorState()
    if state.distributed_type == DistributedType.DEEPSPEED:
        offloaded = (
            ", optimizer on the host" if offloads_optimizer(state.deepspeed_plugin.deepspeed_config) else ""
        )
        return f"DeepSpeed ZeRO-{state.deepspeed_plugin.zero_stage}{offloaded}"
    return "DDP" if distributed.is_distributed() else "one device"


def weight_dtype(accelerator: Accelerator, model: ModelConfig) -> torch.dtype:
    """Type in which the policy is loaded: DeepSpeed keeps float32 masters of its own, elsewhere the weights
    are them.
    """
    return DTYPES[model.dtype] if accelerator.distributed_type == DistributedType.DEEPSPEED else torch.float32


@contextmanager
def unsharded(accelerator: Accelerator) -> Iterator[None]:
    """Within the block ZeRO-3 shards no model while it is made, so that one rank may make one alone."""
    plugin = accelerator.state.deepspeed_plugin
    sharding = None if plugin is None else plugin.dschf
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if sharding is not None:
            set_hf_deepspeed_config(sharding)
