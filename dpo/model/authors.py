"""What we change in a model's config while it is in memory, and what its author set, for its export.

Law 0: policy and reference run without noise. What is noise is decided by meaning: PhiMoE's
`router_jitter_noise` is the threshold of its routing, in evaluation too, and stays.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

NOISE_SUFFIXES = (
    "dropout",
    "pdrop",
    "dropout_prob",
    "dropout_rate",
    "layerdrop",
    "dropout_p",
    "jitter_noise",
    "moe_jitter_eps",
)
"""Ends of the config keys that hold a rate of random noise."""
NO_NOISE = {("phimoe", "router_jitter_noise")}
"""(model type, key) of keys with such a name that evaluation uses too."""
SWITCHES = ("output_router_logits", "output_hidden_states", "output_attentions")
"""Config keys that make a model return more than it needs to, or a loss of its own."""

Settings = dict[tuple[str, ...], Any]
"""Path of a key in a config, through nested configs -> value."""


def remove_noise(config: Any) -> Settings:
    """Sets rates of noise in a transformers config to 0, and what makes outputs larger to False.

    Args:
        config: Of a model; nested configs are included.

    Returns:
        What was changed, with the author's values.
    """
    changed: Settings = {}
    family = getattr(config, "model_type", "")
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            changed |= {(key, *path): old for path, old in remove_noise(value).items()}
        elif key in SWITCHES and value:
            changed[key,] = value
            setattr(config, key, False)
        elif _is_noise(family, key, value):
            changed[key,] = value
            setattr(config, key, 0.0)
    return changed


def _is_noise(family: str, key: str, value: Any) -> bool:
    is_rate = isinstance(value, float) and value != 0
    return is_rate and key.endswith(NOISE_SUFFIXES) and (family, key) not in NO_NOISE


def remember(model: PreTrainedModel, settings: Settings) -> None:
    """Notes on the model what `remove_noise` changed in its config, or in one that holds it."""
    own = {path if hasattr(model.config, path[0]) else path[1:]: value for path, value in settings.items()}
    model.__dict__["authors_settings"] = {path: value for path, value in own.items() if path}


@contextmanager
def authors_settings(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model's config is its author's again, for saving; its cache is on."""
    remembered: Settings = model.__dict__.get("authors_settings", {})
    ours = _exchanged(model.config, {("use_cache",): True, **remembered})
    try:
        yield
    finally:
        _exchanged(model.config, ours)


def _exchanged(config: Any, settings: Settings) -> Settings:
    """Sets values in a config and returns those that were there."""
    before: Settings = {}
    for path, value in settings.items():
        owner = config
        for key in path[:-1]:
            owner = getattr(owner, key)
        before[path] = getattr(owner, path[-1])
        setattr(owner, path[-1], value)
    return before


def kept_in_float32(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """Those weights that the model's authors keep in float32 under bfloat16, such as biases of routers.

    Args:
        model: Of any family.
        names: Of weights and buffers, as in its state dict.
    """
    patterns = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    kept = re.compile("|".join(pattern.replace("*", ".*") for pattern in patterns) or "(?!)")
    return {name for name in names if kept.search(name)}
