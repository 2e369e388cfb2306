"""The DeepSpeed JSON: what we read from it, what it may not contain, and what we fill in for "auto"."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from dpo.errors import UserError

OWNED = {
    "train_batch_size": "train.pairs_per_step",
    "train_micro_batch_size_per_gpu": "train.max_tokens_per_micro_batch",
    "gradient_accumulation_steps": "train.max_tokens_per_micro_batch",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
}
"""DeepSpeed's key -> our key that owns the number (law 8)."""
SMALLEST_BUCKET, LARGEST_BUCKET = 1_000_000, 200_000_000
"""Bounds of the elements that DeepSpeed sends in one message."""
PERSISTENT_PART = 1000
"""Under ZeRO-3, parameters this many times smaller than a block (norms, biases) stay whole on every rank."""


def read_settings(file: Path) -> dict[str, Any]:
    """A DeepSpeed configuration without anything that would be ignored, or would fail an hour later.

    Raises:
        UserError: It is not a JSON object, or contains such settings; all of them.
    """
    try:
        settings = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a DeepSpeed configuration: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file}: not a DeepSpeed configuration: expected an object of keys")
    if found := problems(settings):
        raise UserError(f"{file}: not a DeepSpeed configuration for us:" + "".join(f"\n  {p}" for p in found))
    return settings


def problems(settings: dict[str, Any]) -> list[str]:
    """Everything wrong with a DeepSpeed configuration, each as `key: value; expected what`."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig  # it looks for devices on import
    from pydantic import ValidationError

    found = [
        f'{key}: {settings[key]!r}; set "auto": {ours} of the experiment owns it'
        for key, ours in OWNED.items()
        if settings.get(key, "auto") != "auto"
    ]
    if _part(settings, "fp16").get("enabled", False) not in (False, "auto"):
        found.append("fp16.enabled: expected false; model.dtype has float32 and bfloat16")
    if _part(settings, "bf16").get("enabled", "auto") != "auto":
        found.append('bf16.enabled: set "auto": model.dtype of the experiment owns it')
    zero = settings.get("zero_optimization", {})
    if not isinstance(zero, dict):
        return [*found, f"zero_optimization: {zero!r}; expected an object with a stage"]
    known = DeepSpeedZeroConfig.model_fields
    for key in zero.keys() & known.keys():
        extra: dict[str, Any] = known[key].json_schema_extra or {}
        if extra.get("deprecated"):
            found.append(f"zero_optimization.{key}: DeepSpeed has removed it; use {extra['new_param']}")
    try:
        DeepSpeedZeroConfig(**{key: value for key, value in zero.items() if value != "auto"})
    except ValidationError as error:
        found += [
            f"zero_optimization.{'.'.join(map(str, fault['loc']))}: {fault['input']!r}: {fault['msg']}"
            for fault in error.errors()
        ]
    stage = zero.get("stage", 0)
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        if _part(zero, key).get("device", "none") != "none" and isinstance(stage, int) and stage < least:
            found.append(f"zero_optimization.{key}: needs stage {least} or more, and the stage is {stage}")
    return found


def _part(settings: dict[str, Any], key: str) -> dict[str, Any]:
    part = settings.get(key)
    return part if isinstance(part, dict) else {}


def offloads_optimizer(settings: dict[str, Any]) -> bool:
    """Whether the optimizer's state is kept in the host's memory.

    Args:
        settings: A DeepSpeed configuration.
    """
    offload: dict[str, str] = settings["zero_optimization"].get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def without_waiting(settings: dict[str, Any]) -> None:
    """Turns DeepSpeed's throughput timer off: it waits for the device twice per micro-batch.

    Args:
        settings: A DeepSpeed configuration, a user's own too; changed in place unless it sets that timer.
    """
    settings.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)


def blocks_of(model: nn.Module, *, trained: bool = False) -> list[int]:
    """Parameters of each of a model's repeated blocks, also where ZeRO-3 has sharded them already.

    Args:
        model: Its first list of modules holds the blocks.
        trained: Count only those that need a gradient.
    """
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
    return [
        sum(getattr(p, "ds_numel", p.numel()) for p in block.parameters() if p.requires_grad or not trained)
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
