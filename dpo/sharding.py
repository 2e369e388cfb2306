"""What we read from a DeepSpeed configuration, and what we fill in where it says "auto"."""

from typing import Any

from torch import nn

SMALLEST_BUCKET, LARGEST_BUCKET = 1_000_000, 200_000_000
"""Elements that DeepSpeed sends together."""
PERSISTENT_PART = 1000
"""A parameter this much smaller than a block (a norm, a bias) stays whole on every rank under ZeRO-3."""


def offloads_optimizer(settings: dict[str, Any]) -> bool:
    """Whether the optimizer's state is kept in the host's memory.

    Args:
        settings: A DeepSpeed configuration.
    """
    offload: dict[str, str] = settings["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def blocks_of(model: nn.Module) -> list[int]:
    """Parameters of each of a model's repeated blocks, also where ZeRO-3 has sharded them already."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return [
        sum(getattr(p, "ds_numel", p.numel()) for p in block.parameters())
        for block in next(map(list, lists), [])
    ]


def bucket_elements(block: int) -> int:
    """Elements of the bucket of a model with blocks of this many parameters."""
    return min(max(block, SMALLEST_BUCKET), LARGEST_BUCKET)


def fit_buckets(settings: dict[str, Any], model: nn.Module) -> None:
    """Fills the bucket sizes that are "auto", in elements: a bucket holds one of the model's blocks.

    So the next block is gathered, or the last one's gradients travel, while this one is computed; no buffer
    outgrows a small model, and those of a large one stay below 0.8 GB of float32.

    Args:
        settings: A DeepSpeed configuration; changed in place.
        model: Its largest repeated module is its block; under ZeRO-3 its weights may be sharded already.
    """
    block = min(max(blocks_of(model), default=SMALLEST_BUCKET), LARGEST_BUCKET)
    sizes = {
        "reduce_bucket_size": bucket_elements(block),
        "allgather_bucket_size": bucket_elements(block),
        "stage3_prefetch_bucket_size": block,
        "stage3_param_persistence_threshold": block // PERSISTENT_PART,
    }
    zero = settings["zero_optimization"]
    zero.update({name: size for name, size in sizes.items() if zero.get(name) == "auto"})
