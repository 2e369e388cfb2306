"""Joins the world that the launcher described: one `Accelerator` per process, and how it shards a policy."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from dpo import distributed, terminal
from dpo.config import ModelConfig, OptimizationConfig
from dpo.engine.deepspeed_config import offloads_optimizer
from dpo.engine.launcher import check_launcher, overridden


def start(model: ModelConfig) -> Accelerator:
    """The Accelerator of this process, to be made before the model is loaded, so that ZeRO-3 can shard it.

    Without an accelerator the gloo backend must be named, or Accelerate assumes a world of one on every rank.

    Raises:
        UserError: The launcher would train something else than the configuration describes.
    """
    check_launcher(os.environ, trained=model)
    distributed.start()
    terminal.warning(*overridden(os.environ, model))
    backend = None if torch.cuda.is_available() else "gloo"
    handlers: list[KwargsHandler] = []
    if distributed.is_distributed():
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=distributed.COLLECTIVE_TIMEOUT))
    # of DeepSpeed; without it nothing is cast: the weights have the compute type
    narrow = model.dtype == "bfloat16" and not distributed.trains_without_deepspeed()
    mixed_precision = "bf16" if narrow else "no"
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != mixed_precision:
        AcceleratorState._reset_state()  # of a run before in this process, in another compute type
    cpu = distributed.is_distributed() and distributed.trains_on_cpu_alone()
    return Accelerator(
        mixed_precision=mixed_precision,
        kwargs_handlers=handlers,
        cpu=cpu,
        # or the launcher's number would divide every gradient
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
    )


def make_repeatable(options: OptimizationConfig) -> None:
    """Uses deterministic kernels if the configuration asks for them."""
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)


def kind_here() -> str:
    """How this process shards a policy, after `start`: such as `DeepSpeed ZeRO-2`, `DDP` or `one device`."""
    state = AcceleratorState()
    if state.distributed_type == DistributedType.DEEPSPEED:
        offloaded = (
            ", optimizer on the host" if offloads_optimizer(state.deepspeed_plugin.deepspeed_config) else ""
        )
        return f"DeepSpeed ZeRO-{state.deepspeed_plugin.zero_stage}{offloaded}"
    return "DDP" if distributed.is_distributed() else "one device"


@contextmanager
def unsharded(accelerator: Accelerator) -> Iterator[None]:
    """Within the block ZeRO-3 shards no new model, so that one rank can make one alone."""
    plugin = accelerator.state.deepspeed_plugin
    sharding = None if plugin is None else plugin.dschf
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if sharding is not None:
            set_hf_deepspeed_config(sharding)
