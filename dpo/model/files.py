"""Where a model's files are: config.json, weights, adapter and code, in a local folder or on the hub.

Nothing here loads weights or makes tensors; parameters are counted in the headers of the weight files. A file
that is missing is a `UserError` that names the option.
"""

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import safe_open
from transformers.dynamic_module_utils import get_relative_imports
from transformers.utils import find_adapter_config_file
from transformers.utils.hub import cached_file

from dpo import terminal
from dpo.config import ModelConfig
from dpo.errors import UserError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
POSITION_KEYS = (
    "n_positions",
    "max_position_embeddings",
    "max_sequence_length",
    "max_seq_len",
    "model_max_length",
    "context_length",
    "n_ctx",
)
"""Keys of config.json that limit the length of a sequence; the first that is there counts."""
HUB_SECONDS = 10.0
"""How long the hub may take to answer."""
CODE_KINDS = ("AutoConfig", "AutoModelForCausalLM")
"""Entries of `auto_map` whose code runs when a model is loaded."""


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


@cache
def ask_hub(name_or_path: str) -> None:
    """Asks the hub for a model once; where it does not answer, its cache on this machine is used from now on.

    The libraries would try again for half a minute per file. What the hub lacks is said when it is needed.
    """
    if constants.HF_HUB_OFFLINE or Path(name_or_path).exists():
        return
    try:
        HfApi().model_info(name_or_path, timeout=HUB_SECONDS)
    except (HfHubHTTPError, HFValidationError):
        return
    except Exception as error:  # the connection, in the classes of whichever HTTP library there is
        constants.HF_HUB_OFFLINE = True
        _no_hub.append(f"the hub cannot be reached ({type(error).__name__}: {first_line(error)})")
        terminal.warning(f"{_no_hub[0]}; only its cache on this machine is used")


_no_hub: list[str] = []
"""Why the hub is not asked any more."""


def lacks(name_or_path: str, what: str, reason: str) -> UserError:
    """The error of a model that lacks a file, with the cause first where that is the hub.

    Args:
        name_or_path: The model.
        what: Such as `tokenizer` or `config.json`.
        reason: What the library said.
    """
    if _no_hub and not Path(name_or_path).exists():
        return UserError(
            f"model.name_or_path: {name_or_path} is no folder here, {_no_hub[0]}, and its cache on this "
            f"machine has no {what} of it: expected a model folder, or a hub name that was fetched before"
        )
    return UserError(f"model.name_or_path: no {what} in {name_or_path}: {reason}")


def raw_config(model: ModelConfig) -> dict[str, Any]:
    """The model's config.json as written, before transformers fills in the defaults of its version."""
    path = _resolve(model, "config.json")
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f"model.name_or_path: {path}: not a config.json ({error}); fetch it again") from error


def max_positions(model: ModelConfig) -> int | None:
    """Longest sequence that the model's config allows, in tokens, or None where it has no limit."""
    check_model_path(model.name_or_path, "model.name_or_path")
    return positions_of(raw_config(base_of(model)))


def positions_of(config: dict[str, Any]) -> int | None:
    """Longest sequence that a raw config.json allows, in tokens, or None where it has no limit."""
    config = config.get("text_config", config)
    return next((int(config[key]) for key in POSITION_KEYS if isinstance(config.get(key), int)), None)


def check_token_ids(model: ModelConfig, largest: int, key: str) -> None:
    """Raises UserError if the model has no embedding for a token id of the data.

    Args:
        model: A model, or an adapter of it.
        largest: The largest id of the data.
        key: The option that names the model.
    """
    raw = raw_config(base_of(model))
    rows = raw.get("text_config", raw).get("vocab_size")
    if isinstance(rows, int) and largest >= rows:
        raise UserError(
            f"{key}: {model.name_or_path} has {rows} embeddings, and the data has the token id {largest}; "
            "expected the tokenizer that the model was trained with: resize the embeddings to the tokenizer "
            "and train the new ones, or take the matching tokenizer"
        )


def weight_files(model: ModelConfig) -> list[Path]:
    """The model's safetensors files in name order; those of the hub are downloaded. Raises UserError."""
    ask_hub(model.name_or_path)
    try:
        single = cached_file(
            model.name_or_path,
            WEIGHTS,
            revision=model.revision,
            _raise_exceptions_for_missing_entries=False,
        )
        if single is not None:
            return [Path(single)]
        names = _sharded_names(_resolve(model, WEIGHTS_INDEX))
    except OSError as error:
        raise UserError(
            f"model.name_or_path: {model.name_or_path} has no {WEIGHTS}; expected safetensors: "
            f"{first_line(error)}"
        ) from error
    return [_resolve(model, name) for name in names]


def weights_at_hand(model: ModelConfig) -> bool:
    """Whether all weight files are on this machine, so that reading their headers downloads nothing."""

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

    if local(WEIGHTS) is not None:
        return True
    index = local(WEIGHTS_INDEX)
    names = [] if index is None else _sharded_names(Path(index))
    return bool(names) and all(local(name) is not None for name in names)


def _sharded_names(index: Path) -> list[str]:
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))


def num_parameters(model: ModelConfig) -> int:
    """Number of parameters of the model (of an adapter's base), from the headers of its weight files."""
    total = 0
    for path in weight_files(base_of(model)):
        with safe_open(path, framework="np") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def adapter_config(model: ModelConfig) -> Path | None:
    """The configuration file of a PEFT adapter, or None for a model without one."""
    check_model_path(model.name_or_path, "model.name_or_path")
    ask_hub(model.name_or_path)
    found = find_adapter_config_file(model.name_or_path, revision=model.revision)
    return None if found is None else Path(found)


def adapter_files(model: ModelConfig) -> list[Path]:
    """Configuration and weights of a PEFT adapter; empty for a model without one."""
    found = adapter_config(model)
    return [] if found is None else [found, _resolve(model, ADAPTER_WEIGHTS)]


def base_of(model: ModelConfig) -> ModelConfig:
    """The model itself, or the base model that its PEFT adapter names."""
    found = adapter_config(model)
    if found is None or (Path(model.name_or_path) / "config.json").is_file():
        return model
    try:
        base = json.loads(found.read_text())["base_model_name_or_path"]
        if not isinstance(base, str):
            raise TypeError(base)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{found}: names no base model ({error!r}); expected base_model_name_or_path"
        ) from error
    return replace(model, name_or_path=base, revision=None)


def tokenizer_home(model: ModelConfig) -> ModelConfig:
    """The model, or a folder with a tokenizer alone, or the base of an adapter that was saved without one."""
    folder = Path(model.name_or_path)
    if folder.is_dir() and not (folder / ADAPTER_CONFIG).is_file():
        return model
    if adapter_config(model) is None:
        return model
    found = cached_file(
        model.name_or_path,
        "tokenizer_config.json",
        revision=model.revision,
        _raise_exceptions_for_missing_entries=False,
    )
    return base_of(model) if found is None else model


def code_files(model: ModelConfig) -> list[Path]:
    """The Python files of a model's own code (`auto_map` in its config.json); empty if it may not run.

    Of a local folder every .py file; of a hub repository the modules of configuration and model and what they
    import relatively, as transformers fetches them.
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
            file = _resolve(home, f"{name}.py")
            files.add(file)
            names |= set(get_relative_imports(file))
    return sorted(files)


def _resolve(model: ModelConfig, name: str) -> Path:
    """A file of the model, downloaded if it is on the hub; UserError where there is none."""
    ask_hub(model.name_or_path)
    reason = "no such file"  # transformers returns None for a file that a local folder lacks
    try:
        path = cached_file(model.name_or_path, name, revision=model.revision)
    except OSError as error:
        path, reason = None, first_line(error)
    if path is None:
        raise lacks(model.name_or_path, name, reason)
    return Path(path)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
