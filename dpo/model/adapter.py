"""A finished LoRA adapter in peft's files: read, and put onto its base.

Policy and reference read an adapter here and nowhere else, so that both compute the same function. peft is an
optional dependency and imported only in functions.
"""

import json
import re
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from dpo.config import LoraConfig, ModelConfig
from dpo.errors import UserError
from dpo.model.files import adapter_files, base_of, first_line

NAME = "default"
"""Name of the adapter; peft's own default."""
WRAPPED = "base_model.model."
"""Prefix of the weights' names in peft's files."""
ADAPTED = re.compile(r"(\.base_layer)+\.|\.original_module\.")
"""In the names of a base's weights, what peft puts in where they have an adapter."""
REFUSED = {
    "bias": "none",
    "lora_bias": False,
    "trainable_token_indices": None,
    "alora_invocation_tokens": None,
}
"""peft's options that change more than the adapted layers' products -> the value that is read."""
DESCRIBED_BY = {
    "rank": "r",
    "alpha": "lora_alpha",
    "rank_stabilized": "use_rslora",
    "dora": "use_dora",
    "target_modules": "target_modules",
    "target_parameters": "target_parameters",
    "modules_to_save": "modules_to_save",
}
"""Our option -> peft's, of those that a finished adapter has decided."""


def attach(base: PreTrainedModel, model: ModelConfig, *, dtype: torch.dtype) -> Any:
    """Puts a finished adapter onto its base, which is changed in place; its class stays.

    Args:
        base: The adapter's base. Under ZeRO-3 its weights may be sharded already.
        model: The adapter.
        dtype: Type of the adapter's weights.

    Returns:
        peft's `LoraModel`, which can merge the adapter.

    Raises:
        UserError: The adapter is of another kind, or its weights do not fit the base.
    """
    from peft import LoraModel, set_peft_model_state_dict

    options, file = stored_options(model), adapter_files(model)[1]
    with torch.random.fork_rng(devices=[]):
        try:
            tuner = LoraModel(base, options, NAME)
            stored = {name.removeprefix(WRAPPED): weight for name, weight in load_file(file).items()}
            outcome: Any = set_peft_model_state_dict(base, stored, NAME)
        except (KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            raise UserError(
                f"model.name_or_path: {file} is no adapter of {base_of(model).name_or_path}: "
                f"{first_line(error)}"
            ) from error
    own = [parameter for parameter in base.named_parameters() if parameter[1].requires_grad]
    if wrong := sorted({*outcome.missing_keys} & {name for name, _ in own} | {*outcome.unexpected_keys}):
        raise UserError(
            f"model.name_or_path: {file} is no adapter of {base_of(model).name_or_path}: {len(wrong)} "
            f"weights of one are not in the other, such as {wrong[0]}"
        )
    for _, parameter in own:
        parameter.data = parameter.data.to(dtype)
    return tuner


def stored_options(model: ModelConfig) -> Any:
    """Peft's options of a finished adapter, to train it on: without dropout (law 0).

    Raises:
        UserError: It is not LoRA, or changes more than products of layers.
    """
    options, file = _read(model), adapter_files(model)[0]
    for name, expected in REFUSED.items():
        if (found := getattr(options, name, expected) or expected) != expected:
            raise UserError(
                f"model.name_or_path: {file}: {name}: {found}; expected {expected}: merge the adapter into "
                "its base and give the merged model"
            )
    options.inference_mode, options.lora_dropout = False, 0.0
    options.init_lora_weights = True  # they are read; some other starts would change the base
    base = Path(options.base_model_name_or_path)
    options.base_model_name_or_path = str(base.resolve()) if base.is_dir() else str(base)
    return options


def stored_dropout(model: ModelConfig) -> float:
    """The dropout that an adapter was trained with."""
    return float(_read(model).lora_dropout)


def other_options(lora: LoraConfig, model: ModelConfig) -> list[str]:
    """What `lora` asks for and the finished adapter is not, as `option: asked; the adapter has ...`."""
    options, found = stored_options(model), []
    for field in fields(lora):
        asked = getattr(lora, field.name)
        if field.name not in DESCRIBED_BY or asked == getattr(LoraConfig(), field.name):
            continue
        stored = getattr(options, DESCRIBED_BY[field.name])
        stored = sorted(stored or []) if isinstance(asked, list) and not isinstance(stored, str) else stored
        if (sorted(asked) if isinstance(asked, list) else asked) != stored:
            found.append(f"model.lora.{field.name}: {asked}; the adapter has {stored}")
    return found


def _read(model: ModelConfig) -> Any:
    if find_spec("peft") is None:
        raise UserError(
            f"model.name_or_path: {model.name_or_path} is a PEFT adapter; pip install peft to load it, or "
            "merge it into its base and give the merged model"
        )
    from peft import PeftConfig

    base_of(model)  # it must name one
    file = adapter_files(model)[0]
    try:
        if (kind := json.loads(file.read_text()).get("peft_type")) != "LORA":
            raise UserError(f"model.name_or_path: {file.parent} is a {kind} adapter; expected LORA")
        return PeftConfig.from_pretrained(str(file.parent))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"model.name_or_path: {file}: {first_line(error)}") from error
