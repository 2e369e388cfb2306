"""Model and tokenizer from a local folder or the hub: safetensors only, without noise.

Law 0: policy and reference run without noise (`dpo.model.authors`), so that training, precompute and
evaluation compute the same function. What cannot be loaded is a `UserError`; a missing weight is never
replaced by random numbers.
"""

import ctypes
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import NewGELUActivation
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging as transformers_logging

from dpo.config import ModelConfig
from dpo.errors import UserError
from dpo.model.adapter import attach, stored_options
from dpo.model.authors import remember, remove_noise
from dpo.model.files import (
    base_of,
    check_model_path,
    first_line,
    raw_config,
)
from dpo.model.quantized import compute_plainly, loading_options
from dpo.model.trainable import check_family

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OWN_ATTENTION = {"auto": None, "sdpa": "sdpa", "flex": "sdpa", "eager": "eager"}
"""`model.attention` -> attn_implementation of transformers; None: SDPA where the model has it.

FlexAttention is set up by `dpo.model.scorer`, on a model that is loaded with SDPA.
"""
LARGE_BLOCK = 2**20
"""Bytes from which freed memory is returned to the system; see `return_large_blocks`."""
_M_MMAP_THRESHOLD = -3  # of mallopt, from malloc.h


def check_class(model: ModelConfig) -> None:
    """Raises UserError if transformers has no causal class for the model, or lacks a package for its weights.

    Reads its config.json only.
    """
    check_family(model)
    if quantized := raw_config(base_of(model)).get("quantization_config"):
        if model.quantization is not None:
            raise UserError(
                f"model.quantization: {model.quantization}; {model.name_or_path} has quantized weights "
                "already: leave it out"
            )
        try:
            AutoHfQuantizer.from_config(quantized, pre_quantized=True).validate_environment()
        except ImportError as error:
            raise UserError(
                f"model.name_or_path: {model.name_or_path} has quantized weights: {first_line(error)}"
            ) from error
        except (RuntimeError, ValueError):
            pass  # of this machine, such as no GPU: loading says it where it matters


def load_config(model: ModelConfig) -> PreTrainedConfig:
    """The model's transformers config, or that of an adapter's base, without noise.

    Raises:
        OSError: There is no config.json.
        ValueError: It is not valid.
    """
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    config: PreTrainedConfig = AutoConfig.from_pretrained(base_of(model).name_or_path, **options)
    remove_noise(config)
    return config


def empty_model(config: PreTrainedConfig, model: ModelConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model that `config` describes, set up as by `load_model`, with arbitrary weights.

    For the meta device or FakeTensors.

    Args:
        config: From `load_config`.
        model: Its attention, and whether its own code may run.
        dtype: Type of the weights.
    """
    empty: PreTrainedModel = AutoModelForCausalLM.from_config(
        config,
        dtype=dtype,
        attn_implementation=OWN_ATTENTION[model.attention],
        trust_remote_code=model.trust_remote_code,
    )
    return ready(empty)


def load_model(model: ModelConfig, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal language model on the CPU, without noise, in evaluation mode.

    Args:
        model: Which model, and its compute dtype.
        dtype: Type of the weights; default: `model.dtype`.

    Raises:
        UserError: The folder or hub repository is missing, has no safetensors, or lacks weights of the model.
    """
    check_model_path(model.name_or_path, "model.name_or_path")
    base = base_of(model)
    if base != model:
        stored_options(model)  # refused before anything is loaded
        loaded = load_model(base, dtype=dtype)
        attach(loaded, model, dtype=dtype or DTYPES[model.dtype])
        return loaded
    transformers_logging.disable_progress_bar()  # a load takes seconds, and every rank would have a bar
    if is_deepspeed_zero3_enabled():  # from_pretrained then gathers and shards weight by weight
        return_large_blocks()
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(base_of(model).name_or_path, **options)
        settings = remove_noise(config)
        found: Any = AutoModelForCausalLM.from_pretrained(
            model.name_or_path,
            config=config,
            dtype=dtype or DTYPES[model.dtype],
            attn_implementation=OWN_ATTENTION[model.attention],
            use_safetensors=True,
            output_loading_info=True,
            **options,
            **loading_options(model, dtype or DTYPES[model.dtype]),
        )
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"model.name_or_path: cannot load {model.name_or_path}: {first_line(error)}"
        ) from error
    loaded, report = found
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers
        raise UserError(
            f"model.name_or_path: {model.name_or_path} lacks {len(missing)} weights of "
            f"{type(loaded).__name__}, such as {missing[0]}; expected a complete causal language model"
        )
    remember(loaded, settings)
    compute_plainly(loaded)
    return ready(loaded)


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """The model in evaluation mode, without a key-value cache, and with a faster form of `gelu_new`.

    `gelu_new` makes four passes over its input; `torch.nn.GELU("tanh")` is the same function in one. The
    config still says `gelu_new`, and that is what is saved.
    """
    model.config.use_cache = False
    slow = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, NewGELUActivation)
    ]
    for parent, name in slow:
        setattr(parent, name, nn.GELU(approximate="tanh"))
    model.eval()
    return model


def return_large_blocks() -> None:
    """From now on this process returns large blocks to the system when they are freed; only with glibc.

    Every large block then costs a system call and page faults: little compared with the collective that fills
    it, but too much for processes that do not shard, so it is left off there.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
