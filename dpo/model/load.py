"""Model and tokenizer from a local folder or the hub: safetensors only, every dropout at zero.

Law 0: policy and reference run without dropout; every key of the model's config that ends in a dropout rate
is set to 0, so that training, precompute and evaluation see the same function.
"""

import json
import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
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
from transformers.dynamic_module_utils import get_relative_imports
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import find_adapter_config_file
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file

from dpo.config import ModelConfig
from dpo.errors import UserError
from dpo.model.heap import return_large_blocks

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OWN_ATTENTION = {"auto": None, "sdpa": "sdpa", "flex": "sdpa", "eager": "eager"}
"""What transformers is asked for; None: SDPA where the model has it. FlexAttention comes with the trees."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CODE_KINDS = ("AutoConfig", "AutoModelForCausalLM")
NOISE_SUFFIXES = (
    "dropout",
    "pdrop",
    "dropout_prob",
    "dropout_rate",
    "layerdrop",
    "dropout_p",
    "jitter_noise",
)


def check_model_path(name_or_path: str, key: str) -> None:
    """Raises UserError if `name_or_path` looks like a local path and is not a folder with a config.json.

    A hub name (`gpt2`, `org/name`) passes: only the hub can tell.

    Args:
        name_or_path: What the user gave.
        key: The option's name, for the message.
    """
    path = Path(name_or_path)
    if path.is_dir():
        if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(
                f"{key}: {name_or_path} has no config.json; expected a folder written by save_pretrained"
            )
        return
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1 or path.exists()
    if looks_local:
        raise UserError(
            f"{key}: {name_or_path} does not exist or is not a folder; expected a model folder or a hub name"
        )


def raw_config(model: ModelConfig) -> dict[str, Any]:
    """The model's config.json as written, before transformers fills in the defaults of its version."""
    path = Path(_resolve(model, "config.json"))
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f"model.name_or_path: {path}: not a config.json ({error}); fetch it again") from error


def load_tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with EOS as padding where it has none (padding is always masked)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.name_or_path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.name_or_path: no tokenizer in {model.name_or_path}: {_first_line(error)}"
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


def max_positions(model: ModelConfig) -> int | None:
    """Longest sequence the model's config allows, in tokens, or None where it names no limit."""
    check_model_path(model.name_or_path, "model.name_or_path")
    return positions_of(raw_config(base_of(model)))


def positions_of(config: dict[str, Any]) -> int | None:
    """Longest sequence of a raw config.json, in tokens, or None where it names no limit."""
    config = config.get("text_config", config)
    for key in ("n_positions", "max_position_embeddings", "max_sequence_length", "n_ctx"):
        if isinstance(config.get(key), int):
            return int(config[key])
    return None


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
    if _adapter_config(model) is not None and find_spec("peft") is None:
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
            f"model.name_or_path: cannot load {model.name_or_path}: {_first_line(error)}"
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


def weight_files(model: ModelConfig) -> list[Path]:
    """The safetensors files that hold the model's weights, in name order; downloaded if they are on the
    hub.
    """
    try:
        single = cached_file(
            model.name_or_path,
            "model.safetensors",
            revision=model.revision,
            _raise_exceptions_for_missing_entries=False,
        )
        if single is not None:
            return [Path(single)]
        index = json.loads(Path(_resolve(model, "model.safetensors.index.json")).read_text())
    except OSError as error:
        raise UserError(
            f"model.name_or_path: {model.name_or_path} has no model.safetensors; expected safetensors: "
            f"{_first_line(error)}"
        ) from error
    return [Path(_resolve(model, name)) for name in sorted(set(index["weight_map"].values()))]


def weights_at_hand(model: ModelConfig) -> bool:
    """Whether all weight files are on this machine: reading their headers downloads nothing."""

    def local(name: str) -> str | None:
        found: str | None = cached_file(
            model.name_or_path,
            name,
            revision=model.revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return found

    if local("model.safetensors") is not None:
        return True
    index = local("model.safetensors.index.json")
    names = set(json.loads(Path(index).read_text())["weight_map"].values()) if index is not None else set()
    return bool(names) and all(local(name) is not None for name in names)


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the model, counted in the headers of its weight files: nothing is loaded."""
    total = 0
    for path in weight_files(base_of(model)):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def base_of(model: ModelConfig) -> ModelConfig:
    """The model itself, or the base model that its PEFT adapter names."""
    found = _adapter_config(model)
    if found is None or (Path(model.name_or_path) / "config.json").is_file():
        return model
    try:
        base = json.loads(found.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{found}: names no base model ({error!r}); expected base_model_name_or_path"
        ) from error
    return replace(model, name_or_path=base, revision=None)


def adapter_files(model: ModelConfig) -> list[Path]:
    """Configuration and weights of a PEFT adapter; empty for a model without one."""
    found = _adapter_config(model)
    return [] if found is None else [found, Path(_resolve(model, ADAPTER_WEIGHTS))]


def code_files(model: ModelConfig) -> list[Path]:
    """The code that a model brings along (`auto_map` in its config.json), if it may run; else empty.

    Of a local folder every .py file; of a hub repository the modules of configuration and model, and what
    they import from beside them, as transformers fetches them.
    """
    mapped = raw_config(model).get("auto_map", {}) if model.trust_remote_code else {}
    entries = [mapped[kind] for kind in CODE_KINDS if isinstance(mapped.get(kind), str)]
    folder = Path(model.name_or_path)
    files = set(folder.rglob("*.py")) if entries and folder.is_dir() else set()
    for entry in entries:
        repository, _, name = entry.rpartition("--")
        if folder.is_dir() and not repository:
            continue
        home = replace(model, name_or_path=repository, revision=None) if repository else model
        names, seen = {name.partition(".")[0]}, set[str]()
        while names - seen:
            seen.add(name := min(names - seen))
            files.add(Path(_resolve(home, f"{name}.py")))
            names |= set(get_relative_imports(_resolve(home, f"{name}.py")))
    return sorted(files)


def _adapter_config(model: ModelConfig) -> Path | None:
    check_model_path(model.name_or_path, "model.name_or_path")
    found = find_adapter_config_file(model.name_or_path, revision=model.revision)
    return None if found is None else Path(found)


def _resolve(model: ModelConfig, name: str) -> str:
    reason = "no such file"  # a folder without config.json is not an error to transformers
    try:
        path = cached_file(model.name_or_path, name, revision=model.revision)
    except OSError as error:
        path, reason = None, _first_line(error)
    if path is None:
        raise UserError(f"model.name_or_path: no {name} in {model.name_or_path}: {reason}")
    return str(path)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
