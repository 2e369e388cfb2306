"""A new model for `sft`: random weights in the shape of a config.json, and a tokenizer trained on the text.

With `model.scratch` training starts here instead of `dpo.model.load`. The seed decides the weights, and
dropout is 0 as in a loaded model.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from dpo.config import ScratchConfig
from dpo.errors import UserError
from dpo.model.authors import remember, remove_noise
from dpo.model.files import positions_of
from dpo.model.load import OWN_ATTENTION, ready

END_OF_TEXT = "<|endoftext|>"


def scratch_tokenizer(scratch: ScratchConfig, lines: Iterable[str]) -> PreTrainedTokenizerBase:
    """The named tokenizer, or a byte-level BPE trained on `lines` with one special token for BOS and EOS.

    Args:
        scratch: Names a tokenizer, or the size of the vocabulary to train.
        lines: Text; not read if a tokenizer is named.

    Raises:
        UserError: The named tokenizer cannot be loaded.
    """
    if scratch.tokenizer is not None:
        try:
            return AutoTokenizer.from_pretrained(scratch.tokenizer)
        except (OSError, ValueError) as error:
            raise UserError(f"model.scratch.tokenizer: cannot load {scratch.tokenizer}: {error}") from error
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=scratch.vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def scratch_positions(scratch: ScratchConfig) -> int | None:
    """Longest sequence of the new model, in tokens, or None without a limit."""
    return positions_of(_read_config(scratch))


def scratch_model(
    scratch: ScratchConfig,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    dtype: torch.dtype,
    attention: str,
) -> PreTrainedModel:
    """A model of random weights in the shape of the config file, on the current default device.

    Args:
        scratch: Names the config file.
        tokenizer: Its vocabulary size, BOS and EOS replace those of the file.
        seed: Decides the weights.
        dtype: Type of the weights.
        attention: `model.attention`.

    Raises:
        UserError: The file is missing, or not a config that transformers knows.
    """
    values = _read_config(scratch) | {"vocab_size": len(tokenizer)}
    values |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.scratch.config: {scratch.config}: {error}") from error
    settings = remove_noise(config)
    torch.manual_seed(seed)
    own = OWN_ATTENTION[attention]
    model = AutoModelForCausalLM.from_config(config, attn_implementation=own, dtype=dtype)
    remember(model, settings)
    return ready(model)


def _read_config(scratch: ScratchConfig) -> dict[str, Any]:
    try:
        values = json.loads(Path(scratch.config).read_text())
        return {**values, "model_type": values["model_type"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model.scratch.config: {scratch.config}: {error!r}; expected a config.json with model_type"
        ) from error
