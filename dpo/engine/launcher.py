"""What the launcher says of the arithmetic: Accelerate's file, command line and environment.

The experiment's YAML owns batch size, accumulation, clipping and precision (law 8). What the launcher says of
them is overridden, and named; what would train something else is refused before anything is loaded.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from dpo.config import ModelConfig
from dpo.engine.deepspeed_config import problems, read_settings
from dpo.errors import UserError

MODES = {
    "ACCELERATE_USE_FSDP": "distributed_type: FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "distributed_type: MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}
"""Accelerate's variable -> what its file calls it, of ways to train that the engine does not have."""
VARIABLES = {
    "mixed_precision": "ACCELERATE_MIXED_PRECISION",
    "dynamo_backend": "ACCELERATE_DYNAMO_BACKEND",
    "fp8_backend": "ACCELERATE_FP8_BACKEND",
    "backend": "ACCELERATE_FP8_BACKEND",  # in the file's fp8_config
    "gradient_accumulation_steps": "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
    "gradient_clipping": "ACCELERATE_GRADIENT_CLIPPING",
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
}
"""Key of Accelerate's file -> the variable that its launcher makes of it."""
TYPES = {"DEEPSPEED": "ACCELERATE_USE_DEEPSPEED"} | {
    said.removeprefix("distributed_type: "): name for name, said in MODES.items() if ":" in said
}
INSTEAD = "launch/README.md says which file to take"


def check_launcher(
    environment: Mapping[str, str], *, file: Path | None = None, trained: ModelConfig | None = None
) -> None:
    """Refuses a launcher under which the run would be another one than its configuration describes.

    Args:
        environment: Of a rank, or of the shell that will start the launcher.
        file: Accelerate's file, for a shell: what it says stands above the environment.
        trained: The model that will be trained, if one will be.

    Raises:
        UserError: Everything that is wrong, and where it was said.
    """
    place = "the launcher"
    if file is not None:
        place, environment = str(file), {**environment, **variables_of(file)}
    found = [*_problems(environment)]
    if found:
        raise UserError("".join(f"\n  {place}: {problem}" for problem in found).strip())
    if _uses(environment, "ACCELERATE_USE_DEEPSPEED"):
        stage: Any = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        settings = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
        if settings != "none":
            stage = read_settings(Path(settings))["zero_optimization"].get("stage", 0)
        if str(stage) == "3" and trained is not None:
            _check_zero_3(trained)


def _check_zero_3(model: ModelConfig) -> None:
    """Refuses what does not go together with ZeRO-3."""
    if model.quantization is not None:
        raise UserError(
            f"model.quantization: {model.quantization}; ZeRO-3 cannot shard such weights: take a "
            "launch file of ZeRO-2, launch/one_node.yaml, or leave model.quantization out"
        )
    if model.offload_activations:
        raise UserError(
            "model.offload_activations: it has not been tried under ZeRO-3, whose gathered weights would be "
            "moved too: take a launch file of ZeRO-2, or set model.gradient_checkpointing: full instead"
        )
    if model.compile:
        raise UserError(
            "model.compile: true; it has not been tried under ZeRO-3, which gathers weights inside of what "
            "would be compiled: leave it out, or take a launch file of ZeRO-2, launch/one_node.yaml"
        )


def deepspeed_settings(environment: Mapping[str, str], *, file: Path | None = None) -> dict[str, Any] | None:
    """DeepSpeed's configuration under a launcher that `check_launcher` lets pass; None without DeepSpeed.

    Args:
        environment: As for `check_launcher`.
        file: As for `check_launcher`.
    """
    if file is not None:
        environment = {**environment, **variables_of(file)}
    if not _uses(environment, "ACCELERATE_USE_DEEPSPEED"):
        return None
    settings = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return _inline_settings(environment) if settings == "none" else read_settings(Path(settings))


def overridden(environment: Mapping[str, str], model: ModelConfig) -> list[str]:
    """What the launcher says of numbers that the configuration owns, one line each; it is not used."""
    ours = "bf16" if model.dtype == "bfloat16" else "no"
    owners = {
        "mixed_precision": ("model.dtype", ("no", ours)),
        "gradient_accumulation_steps": ("train.max_tokens_per_micro_batch", ("1", "auto")),
        "gradient_clipping": ("train.max_grad_norm", ("auto", "none")),
    }
    return [
        f"the launcher's {key}: {said} is not used: {owner} of the configuration owns it"
        for key, (owner, silent) in owners.items()
        if (said := environment.get(VARIABLES[key], silent[0])).lower() not in silent
    ]


def variables_of(file: Path) -> dict[str, str]:
    """The environment that Accelerate's launcher makes of its file, as far as it reaches the arithmetic.

    Raises:
        UserError: It cannot be read, or starts one process where it names several.
    """
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: not a configuration of accelerate: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a configuration of accelerate; expected keys and values")
    kind = str(content.get("distributed_type", "NO"))
    if kind == "MULTI_CPU":
        raise UserError(
            f"{file}: distributed_type: MULTI_CPU; accelerate starts one process with it, whatever NPROC and "
            f"num_processes say: take launch/cpu.yaml; {INSTEAD}"
        )
    flat = {
        **content,
        **{k: v for part in content.values() if isinstance(part, dict) for k, v in part.items()},
    }
    found = {
        VARIABLES[key]: str(value) for key, value in flat.items() if key in VARIABLES and value is not None
    }
    found |= {TYPES[kind]: "true"} if kind in TYPES else {}
    return found | (
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"} if content.get("parallelism_config") else {}
    )


def _problems(environment: Mapping[str, str]) -> Iterator[str]:
    for name, said in MODES.items():
        if _uses(environment, name):
            yield f"{said}; expected DEEPSPEED, MULTI_GPU or NO: the engine has no other; {INSTEAD}"
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision not in ("no", "bf16"):
        yield f"mixed_precision: {precision}; expected no or bf16: model.dtype has float32 and bfloat16"
    if (backend := environment.get("ACCELERATE_FP8_BACKEND", "no")).lower() != "no":
        yield f"fp8_backend: {backend}; expected none: model.dtype has float32 and bfloat16"
    if (backend := environment.get("ACCELERATE_DYNAMO_BACKEND", "no")).lower() != "no":
        yield f"dynamo_backend: {backend}; expected no: batches of trees have a shape of their own each"
    several = "MASTER_PORT" in environment and "WORLD_SIZE" not in environment
    if several and _uses(environment, "ACCELERATE_USE_CPU"):
        yield f"--cpu or MULTI_CPU: accelerate has started one process instead of several; {INSTEAD}"
    if _uses(environment, "ACCELERATE_USE_DEEPSPEED"):
        if _uses(environment, "ACCELERATE_USE_CPU"):
            yield "ACCELERATE_USE_CPU: true; accelerate then leaves DeepSpeed half started: unset it"
        yield from _inline_problems(environment)


def _inline_problems(environment: Mapping[str, str]) -> Iterator[str]:
    """Of DeepSpeed's settings in Accelerate's own file, where no JSON is named."""
    if environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") == "none":
        yield from problems(_inline_settings(environment))


def _inline_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    zero: dict[str, Any] = {"stage": int(stage) if stage.isdigit() else stage}
    for key in ("offload_optimizer", "offload_param"):
        zero[key] = {"device": environment.get(f"ACCELERATE_DEEPSPEED_{key.upper()}_DEVICE", "none")}
    return {"zero_optimization": zero}


def _uses(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("true", "1", "yes")
