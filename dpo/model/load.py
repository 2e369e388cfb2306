"""Model and tokenizer from a local folder or the hub: safetensors only, every dropout at zero.

Law 0: policy and reference run without dropout; every key of the model's config that ends in a dropout rate
is set to 0, so that training, precompute and evaluation see the same function.
"""

import ctypes
from importlib.util import find_spec
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import NewGELUActivation
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging as transformers_logging

from dpo.config import ModelConfig
from dpo.errors import UserError
from dpo.model.files import adapter_config, base_of, check_model_path, first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OWN_ATTENTION = {"auto": None, "sdpa": "sdpa", "flex": "sdpa", "eager": "eager"}
"""What transformers is asked for; None: SDPA where the model has it. FlexAttention comes with the trees."""
NOISE_SUFFIXES = (
    "dropout",
    "pdrop",
    "dropout_prob",
    "dropout_rate",
    "layerdrop",
    "dropout_p",
    "jitter_noise",
)


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with EOS as padding where it has none (padding is always masked)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name_or_path: no tokenizer in {model.name_or_path}: {first_line(error)}"
        ) from error
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes one up that knows no text
        raise UserError(
            f"model.name_or_path: no tokenizer in {model.name_or_path}; save one beside the model"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"model.name_or_path: the tokenizer of {model.name_or_path} has no EOS token; set one and save it"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(model: ModelConfig) -> PreTrainedConfig:
    """The model's configuration without dropout; OSError or ValueError where there is none."""
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    config: PreTrainedConfig = AutoConfig.from_pretrained(base_of(model).name_or_path, **options)
    remove_dropout(config)
    return config


def empty_model(config: PreTrainedConfig, model: ModelConfig, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model that `config` describes, as `load_model` would set it up, with weights that mean nothing.

    For the meta device or FakeTensors.

    Args:
        config: Without dropout.
        model: Its attention, and whether its own code may run.
        dtype: Type of the weights.
    """
    attention = OWN_ATTENTION[model.attention]
    options = {"attn_implementation": attention, "trust_remote_code": model.trust_remote_code}
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    return ready(made)


def load_model(model: ModelConfig, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal language model on the CPU, dropout-free, in evaluation mode.

    Args:
        model: Which model, and its compute dtype.
        dtype: Type of the weights; default: `model.dtype`.

    Raises:
        UserError: The folder or hub repository is missing, has no safetensors, or lacks weights of the model.
    """
    check_model_path(model.name_or_path, "model.name_or_path")
    if adapter_config(model) is not None and find_spec("peft") is None:
        raise UserError(
            f"model.name_or_path: {model.name_or_path} is a PEFT adapter; pip install peft to load it, or "
            "merge it into its base and give the merged model"
        )
    transformers_logging.disable_progress_bar()  # one bar a rank for a load of seconds
    if is_deepspeed_zero3_enabled():  # from_pretrained then shards each weight as soon as it is there
        return_large_blocks()
    options = {"revision": model.revision, "trust_remote_code": model.trust_remote_code}
    try:
        config = load_config(model)
        found: Any = AutoModelForCausalLM.from_pretrained(
            model.name_or_path,
            config=config,
            dtype=dtype or DTYPES[model.dtype],
            attn_implementation=OWN_ATTENTION[model.attention],
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"model.name_or_path: cannot load {model.name_or_path}: {first_line(error)}"
        ) from error
    loaded, report = found
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers
        raise UserError(
            f"model.name_or_path: {model.name_or_path} lacks {len(missing)} weights of "
            f"{type(loaded).__name__}, {missing[0]} for one; expected a complete causal language model"
        )
    return ready(loaded)


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """The model in evaluation mode, without a cache of keys, and with its slow activations as fast ones.

    `gelu_new` is four passes over its input and `torch.nn.GELU("tanh")` is the same function in one; the
    config still says `gelu_new`, which is what is saved.
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


def remove_dropout(config: Any) -> None:
    """Sets every dropout rate (and router jitter) of a transformers config, nested ones included, to 0."""
    for key, value in vars(config).items():
        if hasattr(value, "to_dict"):
            remove_dropout(value)
        elif isinstance(value, float) and key.endswith(NOISE_SUFFIXES):
            setattr(config, key, 0.0)


LARGE_BLOCK = 2**20
"""Bytes from which a block is mapped apart, and given back to the system when it is freed."""


_M_MMAP_THRESHOLD = -3  # malloc.h


def return_large_blocks() -> None:
    """From now on this process gives large blocks back when they are freed; without glibc it does nothing.

    A large block then costs a system call and its pages' first touch each time: little beside the collective
    that fills it, and the reason why processes that shard nothing stay as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK)
