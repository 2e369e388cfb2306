"""Saving and loading what DeepSpeed shards, without the faults of its own functions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpo.engine.snapshot import Snapshots

OF_8_BITS = ("SCB", "weight_format")
"""What bitsandbytes stores beside a weight in 8 bits."""
ENGINE_TAG = "engine"
"""Name of the folder that DeepSpeed writes into."""


def save_sharded(
    engine: Any, folder: Path, frozen: set[str], copies: Snapshots | None
) -> list[tuple[Path, Any]]:
    """This rank's part of weights and optimizer, in the files of DeepSpeed. All ranks must call it.

    DeepSpeed's save has barriers inside; nothing is written within them.

    Args:
        engine: DeepSpeed's engine.
        folder: Where.
        frozen: Names of the weights that are not trained, which are left out.
        copies: Copies the state; without it, training on changes what is returned.

    Returns:
        Each file of this rank, and what `torch.save` is to write into it.
    """
    writer, states = engine.checkpoint_engine, list[tuple[Path, Any]]()

    def save(state_dict: dict[str, Any], path: str) -> None:  # DeepSpeed passes these by name
        if "module" in state_dict:  # DeepSpeed leaves one of two tied weights in it
            weights = state_dict["module"].items()
            kept = {name: weight for name, weight in weights if not is_part(name, frozen)}
            state_dict = {**state_dict, "module": kept}
        file = Path(path)
        states.append((file, state_dict if copies is None else copies.take(file.name, state_dict)))

    writer.save = save
    engine._copy_recovery_script = lambda folder: None  # of no use to us, and it may fail on rank 0
    try:
        engine.save_checkpoint(
            str(folder), tag=ENGINE_TAG, save_latest=False, exclude_frozen_parameters=bool(frozen)
        )
    finally:
        del writer.save
    return states


def is_part(name: str, weights: set[str]) -> bool:
    """Whether an entry of a state dict is one of these weights, or belongs to one that is quantized."""
    parts = name.split(".")
    if parts[-1] in OF_8_BITS and ".".join([*parts[:-1], "weight"]) in weights:
        return True
    return any(".".join(parts[:length]) in weights for length in range(len(parts), 0, -1))


def load_sharded(
    engine: Any, folder: Path, load_weights: Callable[[dict[str, Tensor], nn.Module], None] | None
) -> None:
    """Loads what `save_sharded` wrote, or its universal form. All ranks must call it.

    DeepSpeed's load of a universal form has two faults, which are repaired: all parameter groups get the
    hyperparameters of the first, and all parameters share one step counter, which each of them then advances.

    Args:
        engine: DeepSpeed's engine.
        folder: Where.
        load_weights: Puts weights into a module that has its frozen ones already; None: all are loaded.
    """
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    own = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    loaded, _ = engine.load_checkpoint(str(folder), tag=ENGINE_TAG, custom_load_fn=load_weights)
    if loaded is None:
        raise RuntimeError(f"{folder}: DeepSpeed found no checkpoint to load")
    for group, hyperparameters in zip(optimizer.param_groups, own, strict=True):
        group.update(hyperparameters)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].clone()
    if hasattr(optimizer, "ds_opt_adam"):
        _replay_powers(optimizer)


def _replay_powers(optimizer: Any) -> None:
    """Brings DeepSpeed's Adam for CPUs to the step that its state has.

    It multiplies the powers of its decay rates step by step, outside its state. A new one would compute the
    power of the next step at once, which rounds otherwise: the run would not end with the same bits.
    """
    steps = {int(state["step"]) for state in optimizer.state.values() if "step" in state}
    group, nothing = optimizer.param_groups[0], [torch.zeros(1) for _ in range(4)]
    for step in range(1, max(steps, default=0) + 1):
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id,
            step,
            0.0,
            *group["betas"],
            group["eps"],
            0.0,
            group["bias_correction"],
            *nothing,
        )
