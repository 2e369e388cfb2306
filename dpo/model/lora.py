"""LoRA through peft: an adapter that is trained on a frozen base.

A new adapter adds zero at the start, so the policy equals its base, and the reference cache and its audit are
those of full fine-tuning. The random half of the adapter depends only on the run's seed. An adapter that is
trained on starts as it was, and so does its reference. peft is an optional dependency and imported only here,
in `adapter`, `lora_layers` and `lora_export`.
"""

import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from dpo import terminal
from dpo.config import ModelConfig
from dpo.errors import UserError
from dpo.model.adapter import NAME, attach, other_options, stored_dropout, stored_options
from dpo.model.files import adapter_files, base_of
from dpo.model.load import DTYPES, check_class, empty_model, load_config, load_model
from dpo.model.lora_layers import cannot_adapt, cannot_stack, left_out, new_options, refuse_other_layers
from dpo.model.quantized import check_quantization
from dpo.model.routers import check_balancing
from dpo.model.trainable import refuse_adapter


def load_policy(model: ModelConfig, *, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """The model to train, on the CPU: with `model.lora` a frozen base with an adapter, else the model itself.

    Args:
        model: The model; its compute dtype is also the type of the weights of a frozen base.
        dtype: Type of the weights that are trained.
        seed: Decides the start of a new adapter.

    Raises:
        UserError: The model cannot be loaded, or cannot have this adapter.
    """
    if model.lora is None:
        return load_model(model, dtype=dtype)
    base = load_start(model)
    if model.lora.start == "continue":
        attach(base, model, dtype=dtype)
        refuse_other_layers(base, model.lora)
        terminal.note(_continued(model))
        return base
    add_adapter(base, model, dtype=dtype, seed=seed)
    if model.lora.target_modules == "all-linear" and (note := left_out(base)):
        terminal.warning(note)
    return base


def load_start(model: ModelConfig) -> PreTrainedModel:
    """The base that an adapter is trained on, in the compute dtype; the one that it starts from is merged.

    Each sum of a merge is rounded once.
    """
    assert model.lora is not None
    base = load_model(base_of(model))
    if model.lora.start != "merge":
        return base
    merged: PreTrainedModel = attach(base, model, dtype=torch.float32).merge_and_unload(progressbar=False)
    return merged


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
    check_quantization(model)
    if not model.name_or_path or (local and not Path(model.name_or_path).is_dir()):
        return
    _check_start(model)
    if local and not Path(base_of(model).name_or_path).is_dir():
        return
    check_class(model)
    if model.router_aux_loss_weight:
        check_balancing(load_config(model))
    if local and model.lora is not None:
        num_adapter_parameters(model)  # raises if the model lacks the layers


def _check_start(model: ModelConfig) -> None:
    """Raises UserError unless `lora.start` is one that this model has."""
    refuse_adapter(model)
    start = model.lora.start if model.lora is not None else "new"
    if start == "new" or model.lora is None:
        return
    if not adapter_files(model):
        raise UserError(
            f"model.lora.start: {start}; {model.name_or_path} is not an adapter (it has no "
            "adapter_config.json): leave it out to train a new one"
        )
    if base_of(model) == model:
        raise UserError(
            f"model.lora.start: {start}; {model.name_or_path} holds a model and an adapter: move the "
            "adapter's two files into a folder of their own"
        )
    stored_options(model)
    if start == "continue" and (found := other_options(model.lora, model)):
        raise UserError("; ".join(found) + ": leave it out, or set model.lora.start: merge for a new adapter")


def add_adapter(model: PreTrainedModel, config: ModelConfig, *, dtype: torch.dtype, seed: int) -> Any:
    """Adds an adapter to the model and freezes everything else.

    A new adapter's product is zero; one that is trained on gets its layers here, and its weights from
    `attach`. It is the same on every rank and engine. The process's random state does not change.

    Args:
        model: The base; changed in place, its class stays. Under ZeRO-3 its weights may be sharded already.
        config: The base's name and the adapter's options.
        dtype: Type of the adapter's weights.
        seed: Decides the random half of a new adapter.

    Returns:
        peft's `LoraModel`, which can merge the adapter.

    Raises:
        UserError: The model lacks the layers, or they cannot be adapted.
    """
    assert config.lora is not None
    options = stored_options(config) if config.lora.start == "continue" else new_options(model, config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            tuner = _wrapped(model, options)
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            of_parameters = "ParamWrapper" in reason
            raise (cannot_stack if of_parameters else cannot_adapt)(config.lora, reason) from error
    refuse_other_layers(model, config.lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return tuner


def _wrapped(model: PreTrainedModel, options: Any) -> Any:
    """Peft's `LoraModel`; what it warns of, names that fit nothing, is an error of `refuse_other_layers`."""
    from peft import LoraModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return LoraModel(model, options, NAME)


def num_adapter_parameters(model: ModelConfig) -> int:
    """Number of parameters of the adapter that `model` asks for, from its configuration: loads no weights.

    Must not be called while transformers is set up to shard new models with ZeRO-3.

    Raises:
        UserError: The model cannot have this adapter.
    """
    with torch.device("meta"):
        policy = empty_policy(load_config(model), model, dtype=DTYPES[model.dtype])
    return sum(p.numel() for p in policy.parameters() if p.requires_grad)


def _continued(model: ModelConfig) -> str:
    """What is trained on, for people."""
    options, dropout = stored_options(model), stored_dropout(model)
    off = f"; its dropout of {dropout:g} is off, as in every run" if dropout else ""
    return (
        f"training on the adapter {model.name_or_path}: rank {options.r}, alpha {options.lora_alpha:g}{off}"
    )
