"""The messages of a rank in an optimizer step, as DeepSpeed's communication logger counts them.

From the shape of the model alone, for `dpo plan`; tests compare them with real ranks.
"""

import torch

from dpo.planning.memory import FLOAT32, GATHERED_ELEMENTS, Name, Shape

Traffic = dict[str, float]
"""Kind of collective -> bytes that a rank passes to it."""


def traffic(
    sharding: Name,
    shape: Shape,
    *,
    world_size: int,
    dtype: torch.dtype,
    micro_batches: float,
    scored: float = 0.0,
) -> Traffic:
    """Messages of one rank in a step; gradients are sent in float32.

    Stages 2 and 3 reduce the gradients after every micro-batch, stage 0 once per step. Weights that stay
    gathered from the forward to the backward pass are gathered once.

    Args:
        sharding: How the policy is sharded.
        shape: Of the model.
        world_size: Number of ranks.
        dtype: The compute type.
        micro_batches: Micro-batches of a rank per step, on average.
        scored: Forward passes without gradient besides, with a cached gradient.
    """
    if world_size == 1:
        return {}
    width = dtype.itemsize
    gradients = float(FLOAT32 * shape.trainable)
    if sharding in ("no DeepSpeed", "ZeRO-0"):
        return {"all_reduce": gradients}
    if sharding == "ZeRO-2":
        gathered = width * shape.trainable / world_size
        return {"all_reduce": gradients * micro_batches, "all_gather_into_tensor": gathered}
    stays = min(1.0, GATHERED_ELEMENTS / shape.parameters)
    gathered = width * shape.parameters / world_size
    return {
        "all_gather_into_tensor": gathered * ((2 - stays) * micro_batches + scored),
        "reduce_scatter_tensor": gradients * micro_batches,
    }


def sent(messages: Traffic, world_size: int) -> float:
    """Bytes that leave a rank if the collectives are rings."""
    factors = {
        "all_reduce": 2 * (world_size - 1) / world_size,
        "reduce_scatter_tensor": (world_size - 1) / world_size,
        "all_gather_into_tensor": world_size - 1.0,  # its message is only the rank's own part
    }
    return sum(factors[name] * size for name, size in messages.items())
