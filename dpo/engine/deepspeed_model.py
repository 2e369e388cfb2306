"""What DeepSpeed does to a model: the buckets that its blocks need, and weights that must not be rounded."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dpo.errors import UserError
from dpo.model.authors import kept_in_float32
from dpo.model.quantized import num_elements

SMALLEST_BUCKET, LARGEST_BUCKET = 1_000_000, 200_000_000
"""Bounds of the elements that DeepSpeed sends in one message."""
PERSISTENT_PART = 1000
"""Under ZeRO-3, parameters this many times smaller than a block (norms, biases) stay whole on every rank."""


def refuse_rounding(model: PreTrainedModel, dtype: torch.dtype, otherwise: str) -> None:
    """Refuses a model some of whose weights DeepSpeed would round against its authors' will.

    It has one type for all weights; buffers it leaves as they are.

    Args:
        model: Before DeepSpeed has it.
        dtype: The compute type.
        otherwise: How to do without DeepSpeed, for people.

    Raises:
        UserError: There are such weights.
    """
    kept = sorted(kept_in_float32(model, (name for name, _ in model.named_parameters())))
    if kept and dtype != torch.float32:
        raise UserError(
            f"model.dtype: bfloat16; DeepSpeed would round {len(kept)} weights of {type(model).__name__} "
            f"that its authors keep in float32, such as {kept[0]}: set model.dtype float32, or {otherwise}"
        )


def blocks_of(model: nn.Module, *, trained: bool = False) -> list[int]:
    """Parameters of each of a model's repeated blocks, also where ZeRO-3 has sharded them already.

    Args:
        model: Its first list of modules holds the blocks.
        trained: Count only those that need a gradient.
    """
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return [
        num_elements(p for p in block.parameters() if p.requires_grad or not trained)
        for block in next(map(list, lists), [])
    ]


def bucket_elements(block: int) -> int:
    """Elements of the bucket of a model with blocks of this many parameters."""
    return min(max(block, SMALLEST_BUCKET), LARGEST_BUCKET)


def fit_buckets(settings: dict[str, Any], model: nn.Module) -> None:
    """Fills the bucket sizes that are "auto", in elements: a bucket holds one of the model's blocks.

    The next block is gathered, or the last one's gradients are sent, while this one is computed. Buffers are
    never larger than a small model, and those of a large model stay below 0.8 GB of float32.

    Args:
        settings: A DeepSpeed configuration; changed in place.
        model: Its largest repeated module is its block; under ZeRO-3 its weights may be sharded already.
    """
    block = min(max(blocks_of(model), default=SMALLEST_BUCKET), LARGEST_BUCKET)
    trained = max(blocks_of(model, trained=True), default=SMALLEST_BUCKET)  # only these are sent as gradients
    sizes = {
        "reduce_bucket_size": bucket_elements(trained),
        "allgather_bucket_size": bucket_elements(trained),
        "stage3_prefetch_bucket_size": block,
        "stage3_param_persistence_threshold": block // PERSISTENT_PART,
    }
    zero = settings["zero_optimization"]
    zero.update({name: size for name, size in sizes.items() if zero.get(name) == "auto"})
