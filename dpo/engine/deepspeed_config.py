"""The DeepSpeed JSON: what we read from it, what it may not contain, and what the experiment sets in it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpo import alive
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
PASSED_ON = {
    *("zero_optimization", "bf16", "fp16", "data_types", "communication_data_type", "aio"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "timers"),
    *("comms_logger", "flops_profiler", "tensorboard", "wandb", "csv_monitor", "comet"),
    *("disable_python_gc", "comment", "_comment"),
}
"""DeepSpeed's other keys that change no number. Any other that is not switched off is refused."""
ROUNDING = (
    "zenflow",
    "zero_quantized_weights",
    "zero_quantized_nontrainable_weights",
    "zero_quantized_gradients",
)
"""Keys of `zero_optimization` under which weights or gradients are not what one process computes."""


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
    found += _arithmetic_problems(settings)
    zero = settings.get("zero_optimization")
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


def _arithmetic_problems(settings: dict[str, Any]) -> Iterator[str]:
    """Settings that would change numbers, or that DeepSpeed refuses, or that nothing reads."""
    from deepspeed.runtime import config

    removed: dict[str, str] = getattr(config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", {})
    for key, value in settings.items():
        if key in removed:
            yield f"{key}: DeepSpeed has removed it; leave it out"
        elif key not in OWNED and key not in PASSED_ON and not _is_off(value):
            yield f"{key}: {value!r}; leave it out: it would change what is computed, or nothing reads it"
    for key, wanted, said in _precisions(settings):
        if said not in (None, "auto", wanted):
            yield f"{key}: {said!r}; expected {wanted!r}: sums over ranks must not be rounded"
    for key, value in _part(settings, "bf16").items():
        if key != "enabled" and not _is_off(value):
            yield f"bf16.{key}: {value!r}; leave it out: master weights and their gradients are float32"
    zero = _part(settings, "zero_optimization")
    for key in ROUNDING:
        if not _is_off(zero.get(key)):
            yield f"zero_optimization.{key}: {zero[key]!r}; leave it out: it rounds weights or gradients"
    if zero.get("compute_grad_norm", True) is not True:
        yield "zero_optimization.compute_grad_norm: false; leave it out: steps are skipped by the norm"


def _precisions(settings: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(key, what it must be, what it is) of the types in which gradients are summed."""
    yield "communication_data_type", "fp32", settings.get("communication_data_type")
    for key, value in _part(settings, "data_types").items():
        yield f"data_types.{key}", "fp32" if key == "grad_accum_dtype" else "auto", value


def _is_off(value: Any) -> bool:
    """Whether a setting is written down but switched off, such as `{"enabled": false}` or a degree of 1."""
    if isinstance(value, dict):
        return value.get("enabled") is False or all(_is_off(part) for part in value.values())
    return value is not True and value in (None, False, 0, 1, "auto", "mean", "none")


def set_ours(settings: dict[str, Any], *, max_grad_norm: float, universal: bool) -> None:
    """Writes the numbers that the experiment owns over whatever the launcher put there (law 8).

    Args:
        settings: The DeepSpeed configuration that Accelerate made; changed in place.
        max_grad_norm: `train.max_grad_norm`; 0: no clipping.
        universal: Whether a state in its universal form will be loaded.
    """
    settings |= {
        "train_micro_batch_size_per_gpu": 1,  # tokens size our micro-batches
        "gradient_accumulation_steps": 1,  # `Engine.accumulate` divides by the step's count
        "gradient_clipping": max_grad_norm,
        "checkpoint": {"load_universal": universal},
        "communication_data_type": "fp32",  # DeepSpeed's default is the compute type
        "data_types": {**_part(settings, "data_types"), "grad_accum_dtype": "fp32"},
    }
    settings.pop("train_batch_size", None)  # DeepSpeed multiplies the others
    if settings["zero_optimization"].get("stage") == 3:  # DeepSpeed's default is a run without a model
        settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True


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


def compile_for_host(settings: dict[str, Any]) -> None:
    """Compiles DeepSpeed's AdamW for an offloaded optimizer, where this machine has not done so.

    Args:
        settings: A DeepSpeed configuration; without an offloaded optimizer nothing is compiled.

    Raises:
        UserError: It could not be compiled.
    """
    if not offloads_optimizer(settings):
        return
    from deepspeed.ops.op_builder import CPUAdamBuilder  # here: DeepSpeed looks for devices when imported

    alive.loading("compiling DeepSpeed's AdamW for the host")
    try:
        CPUAdamBuilder().load()
    except Exception as error:
        lines = str(error).splitlines() or [type(error).__name__]  # of the compiler's whole output
        reason = next((line for line in lines if "error: " in line or "not found" in line), lines[0])
        raise UserError(
            f"offload_optimizer: DeepSpeed cannot compile its AdamW for the host ({reason}): install g++ and "
            "ninja, or use a DeepSpeed configuration without offload_optimizer"
        ) from error


def without_waiting(settings: dict[str, Any]) -> None:
    """Turns DeepSpeed's throughput timer off: it waits for the device twice per micro-batch.

    Args:
        settings: A DeepSpeed configuration, a user's own too; changed in place unless it sets that timer.
    """
    settings.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
