"""A sequence classifier and its tokenizer, as scorers load them."""

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)

from dpo.errors import UserError
from dpo.model.files import ask_hub


def describe_classifier(scorer: str, model: str) -> tuple[PreTrainedTokenizerBase, PreTrainedConfig]:
    """Tokenizer and configuration of a classifier, without its weights; arguments as for `load_classifier`.

    Raises:
        UserError: One of them cannot be loaded.
    """
    ask_hub(model)
    try:
        return AutoTokenizer.from_pretrained(model), AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise _cannot_load(scorer, model, error) from error


def load_classifier(
    scorer: str, model: str, dtype: torch.dtype | str
) -> tuple[PreTrainedTokenizerBase, Any, list[str]]:
    """Loads a classifier on the CPU, with a token that pads.

    Args:
        scorer: Its name, for messages.
        model: A folder or a hub name with safetensors weights.
        dtype: Of the weights; auto: as they are stored.

    Returns:
        The tokenizer, the model, and the names of weights that the files lack.

    Raises:
        UserError: It cannot be loaded.
    """
    ask_hub(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        loaded, report = AutoModelForSequenceClassification.from_pretrained(
            model, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise _cannot_load(scorer, model, error) from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    loaded.config.pad_token_id = tokenizer.pad_token_id
    return tokenizer, loaded, sorted(report["missing_keys"])


def _cannot_load(scorer: str, model: str, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"scorer {scorer}: cannot load {model}; expected a folder or a hub name: {reason}")
