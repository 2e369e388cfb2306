"""The result of training an adapter: merged into its base, or alone in peft's files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo.config import ModelConfig
from dpo.model.adapter import NAME, WRAPPED
from dpo.model.export import export_model, exported_folder
from dpo.model.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from dpo.model.lora import add_adapter, load_start


def export_trained(
    config: ModelConfig,
    policy: PreTrainedModel,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    card: str,
) -> None:
    """Writes the result of training: the whole model, or with `lora.export: adapter` the adapter alone.

    Args:
        config: The model that was trained.
        policy: The bare policy, for its configuration.
        weights: On the CPU: all weights, or with `model.lora` those of the adapter, in float32.
        tokenizer: The tokenizer it was trained with.
        folder: The final place; replaced if it exists.
        card: The model card, Markdown.
    """
    if config.lora is None:
        export_model(policy, weights, tokenizer, folder, card)
    elif config.lora.export == "merged":
        merged = merged_model(config, weights)
        export_model(merged, merged.state_dict(), tokenizer, folder, card)
    else:
        with exported_folder(tokenizer, folder, card) as building:
            save_adapter(policy, weights, building)


def merged_model(config: ModelConfig, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """The base with an adapter merged into its weights, in the compute dtype; each sum is rounded once.

    Of a quantized base the values that its weights stand for.

    Args:
        config: Base and adapter.
        weights: The adapter's weights in float32, by the policy's names.

    Raises:
        RuntimeError: The weights are not those of this adapter.
    """
    base = load_start(config)
    if config.quantization is not None:
        base.dequantize()
    tuner = add_adapter(base, config, dtype=torch.float32, seed=0)
    adapter = {name for name, parameter in base.named_parameters() if parameter.requires_grad}
    if different := adapter ^ weights.keys():
        raise RuntimeError(f"the adapter does not fit its base: {min(different)}")
    base.load_state_dict(weights, strict=False)
    merged: PreTrainedModel = tuner.merge_and_unload(progressbar=False)
    return merged


def save_adapter(policy: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Writes configuration and weights of an adapter in the format of peft and transformers.

    Args:
        policy: The model with the adapter.
        weights: The adapter's weights in float32, by the policy's names.
        folder: An existing folder.
    """
    options: Any = policy.peft_config[NAME]
    options.save_pretrained(folder)
    file = folder / ADAPTER_CONFIG
    written = json.loads(file.read_text())
    for name, value in written.items():
        if isinstance(getattr(options, name, None), set):
            written[name] = sorted(value)  # in any order in peft
    written["inference_mode"] = True
    file.write_text(json.dumps(written, indent=2, sort_keys=True))
    save_file(_in_peft_names(policy, weights), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})


def _in_peft_names(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights by their names in peft's files: without the adapter's name, with the wrapper's prefix."""
    from peft import get_peft_model_state_dict

    named: dict[str, Tensor] = get_peft_model_state_dict(
        model, state_dict=dict(weights), adapter_name=NAME, save_embedding_layers=False
    )
    return {f"{WRAPPED}{name}": weight.contiguous() for name, weight in named.items()}
