"""LoRA through peft: an adapter that is trained on a frozen base, and its export.

At the start the adapter adds zero, so the policy equals its base, and the reference cache and its audit are
those of full fine-tuning. The random half of the adapter depends only on the run's seed. peft is an optional
dependency and imported only here.
"""

import json
import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from dpo import terminal
from dpo.config import LoraConfig, ModelConfig
from dpo.errors import UserError
from dpo.model.export import export_model, exported_folder
from dpo.model.files import ADAPTER_WEIGHTS, adapter_files
from dpo.model.load import DTYPES, check_class, empty_model, load_config, load_model

ADAPTER_CONFIG = "adapter_config.json"
NAME = "default"
"""Name of the adapter; peft's own default."""
PARTS_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3")
WRAPPED = "base_model.model."
"""Prefix of the weights' names in peft's files."""


def load_policy(model: ModelConfig, *, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """The model to train, on the CPU: with `model.lora` a frozen base with an adapter, else the model itself.

    Args:
        model: The model; its compute dtype is also the type of the weights of a frozen base.
        dtype: Type of the weights that are trained.
        seed: Decides the start of the adapter.

    Raises:
        UserError: The model cannot be loaded, or cannot have this adapter.
    """
    if model.lora is None:
        return load_model(model, dtype=dtype)
    base = load_model(model)
    add_adapter(base, model, dtype=dtype, seed=seed)
    if model.lora.target_modules == "all-linear" and (note := _left_out(base)):
        terminal.warning(note)
    return base


def empty_policy(config: PreTrainedConfig, model: ModelConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """The policy as from `load_policy`, with arbitrary weights: for the meta device.

    Args:
        config: Of the base, from `load_config`.
        model: The model's options.
        dtype: Type of the weights that are trained.

    Raises:
        UserError: The model cannot have this adapter.
    """
    if model.lora is None:
        return empty_model(config, model, dtype=dtype)
    base = empty_model(config, model, dtype=DTYPES[model.dtype])
    add_adapter(base, model, dtype=dtype, seed=0)
    return base


def check_policy(model: ModelConfig, *, local: bool = False) -> None:
    """Raises UserError if this model cannot be trained as configured; reads configurations only.

    Args:
        model: The model, and the adapter's options.
        local: Skip checks that need the hub.
    """
    if model.lora is not None and find_spec("peft") is None:
        raise UserError(
            'model.lora: adapters need peft, which is not installed: pip install "cached-dpo[lora]", or '
            "leave model.lora out to train all weights"
        )
    if not model.name_or_path or (local and not Path(model.name_or_path).is_dir()):
        return
    if adapter_files(model):
        raise UserError(
            f"model.name_or_path: {model.name_or_path} is a PEFT adapter, which cannot be trained further; "
            "merge it into its base and give the merged model"
        )
    check_class(model)
    if local and model.lora is not None:
        num_adapter_parameters(model)  # raises if the model lacks the layers


def add_adapter(model: PreTrainedModel, config: ModelConfig, *, dtype: torch.dtype, seed: int) -> Any:
    """Adds an adapter, whose product is zero, to the model and freezes everything else.

    The adapter is the same on every rank and engine. The process's random state does not change.

    Args:
        model: The base; changed in place, its class stays. Under ZeRO-3 its weights may be sharded already.
        config: The base's name and the adapter's options.
        dtype: Type of the adapter's weights.
        seed: Decides the random half of the adapter.

    Returns:
        peft's `LoraModel`, which can merge the adapter.

    Raises:
        UserError: The model lacks the layers, or they cannot be adapted.
    """
    from peft import LoraModel

    assert config.lora is not None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            tuner = LoraModel(model, _peft_options(model, config), NAME)
        except ValueError as error:
            raise _cannot_adapt(config.lora, " ".join(str(error).split())) from error
    _refuse_other_layers(model, config.lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return tuner


def num_adapter_parameters(model: ModelConfig) -> int:
    """Number of parameters of the adapter that `model` asks for, from its configuration: loads no weights.

    Must not be called while transformers is set up to shard new models with ZeRO-3.

    Raises:
        UserError: The model cannot have this adapter.
    """
    with torch.device("meta"):
        policy = empty_policy(load_config(model), model, dtype=DTYPES[model.dtype])
    return sum(p.numel() for p in policy.parameters() if p.requires_grad)


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

    Args:
        config: Base and adapter.
        weights: The adapter's weights in float32, by the policy's names.

    Raises:
        RuntimeError: The weights are not those of this adapter.
    """
    base = load_model(config)
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
    written["target_modules"] = sorted(written["target_modules"])  # a set in peft, so in any order
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


def _peft_options(model: PreTrainedModel, config: ModelConfig) -> Any:
    from peft import LoraConfig as PeftOptions

    lora = config.lora
    assert lora is not None
    base = Path(config.name_or_path)
    return PeftOptions(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it by the rank without rounding
        target_modules=_all_linear(model) if lora.target_modules == "all-linear" else lora.target_modules,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        base_model_name_or_path=str(base.resolve()) if base.is_dir() else config.name_or_path,
    )


def _all_linear(model: PreTrainedModel) -> list[str]:
    """Names of every linear layer but the output layer: their last parts, unless other modules share them."""
    head = model.get_output_embeddings()
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    others = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in linear}
    last = {name: name.rpartition(".")[2] for name in linear}
    if _num_stacked(model):  # peft takes these names for parts of the experts
        last = {name: end for name, end in last.items() if end not in PARTS_OF_EXPERTS}
    return sorted({name if end in others or end.isdigit() else end for name, end in last.items()})


def _num_stacked(model: PreTrainedModel) -> int:
    """Number of weights of experts that are one tensor per block."""
    shapes = [getattr(p, "ds_shape", p.shape) for p in model.parameters()]
    return sum(math.prod(shape) for shape in shapes if len(shape) == 3 and shape[1] > 1)


def _left_out(model: PreTrainedModel) -> str | None:
    """What an adapter of all linear layers does not reach, for people; None where that is nothing."""
    experts = _num_stacked(model)
    if not experts:
        return None
    whole = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in model.parameters())
    return (
        "model.lora: all-linear leaves out the experts, which are one tensor per block, and layers whose "
        f"names they share: the experts' {experts / whole:.0%} of the weights stay as they are"
    )


def _refuse_other_layers(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Refuses the output layer, whose weights are read directly, and embeddings, which may be tied to it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module is head:
            raise _cannot_adapt(lora, f"{name} is the output layer")
        if not isinstance(module.get_base_layer(), nn.Linear | Conv1D):
            raise _cannot_adapt(lora, f"{name} is a {type(module.get_base_layer()).__name__}")


def _cannot_adapt(lora: LoraConfig, reason: str) -> UserError:
    short = reason if len(reason) <= 200 else f"{reason[:200]} ..."
    return UserError(
        f"model.lora.target_modules: {lora.target_modules}; {short}: expected all-linear, or names of linear "
        "layers inside the model's blocks, such as q_proj"
    )
