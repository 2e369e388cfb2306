"""What sampling asks of `generate`: padding, which rows may be together, prompts that are computed once."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, PreTrainedModel

from dpo.distributed import device

COMPARED, SAME_DISTRIBUTION = 8, 0.05
"""Tokens over which a model's batches are compared with rows alone, and the distance (total variation) of
distributions of the next token that rounding explains in bfloat16."""
Together = Literal["padded", "equal lengths", "alone"]
"""What may be in one batch."""


def together(
    model: PreTrainedModel, prompts: Sequence[npt.NDArray[np.int32]], pad_token_id: int, *, sharded: bool
) -> Together:
    """Which prompts the model continues in one batch as it does alone: RWKV takes padding for text."""
    if not prompts:
        return "padded"
    first, last = min(prompts, key=len), max(prompts, key=len)
    follow = partial(_distributions, model, pad_token_id=pad_token_id, sharded=sharded)
    alone = follow([first])
    if _distance(alone, follow([first, last])) <= SAME_DISTRIBUTION:
        return "padded"
    return "equal lengths" if _distance(alone, follow([first, first])) <= SAME_DISTRIBUTION else "alone"


def can_share(
    model: PreTrainedModel,
    prompts: Sequence[npt.NDArray[np.int32]],
    pad_token_id: int,
    how: Together,
    *,
    sharded: bool,
) -> bool:
    """Whether a prompt that is computed once for several rows is continued as it is alone.

    A model whose memory is no list of keys and values, such as a recurrent one, may not be able to.
    """
    first, last = min(prompts, key=len), max(prompts, key=len)
    several = [first, first, last] if how == "padded" else [first, first]
    follow = partial(_distributions, model, pad_token_id=pad_token_id, sharded=sharded)
    alone = follow([first])
    try:
        shared = follow(several, **computed_once(model, several, pad_token_id, sharded=sharded))
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False  # what a memory of another kind raises; every prompt is then computed for itself
    return _distance(alone, shared) <= SAME_DISTRIBUTION


@torch.no_grad()
def computed_once(
    model: PreTrainedModel, prompts: Sequence[npt.NDArray[np.int32]], pad_token_id: int, *, sharded: bool
) -> dict[str, Any]:
    """Computes the distinct prompts, but for their last tokens; returns what makes `generate` go on there.

    Args:
        model: In evaluation mode.
        prompts: Of the rows, of at least two tokens; equal ones may repeat.
        pad_token_id: What pads on the left.
        sharded: Whether all ranks must take part.
    """
    places = {prompt.tobytes(): place for place, prompt in enumerate(prompts)}
    distinct = list(places)
    ids, mask = left_padded([prompts[places[key]] for key in distinct], pad_token_id)
    start = GenerationConfig(
        max_new_tokens=1, use_cache=True, pad_token_id=pad_token_id, return_dict_in_generate=True
    )
    with own_generation_config(model, start):
        output = model.generate(  # type: ignore[operator]
            inputs=ids[:, :-1].to(device()), attention_mask=mask[:, :-1].to(device()), synced_gpus=sharded
        )
    rows = torch.tensor([distinct.index(prompt.tobytes()) for prompt in prompts], device=device())
    output.past_key_values.batch_select_indices(rows)
    return {"past_key_values": output.past_key_values}


@torch.no_grad()
def _distributions(
    model: PreTrainedModel,
    prompts: Sequence[npt.NDArray[np.int32]],
    *,
    pad_token_id: int,
    sharded: bool,
    **start: Any,
) -> list[tuple[int, torch.Tensor]]:
    """The likeliest token and the distribution of each of the tokens that follow the first prompt."""
    ids, mask = left_padded(prompts, pad_token_id)
    output = model.generate(  # type: ignore[operator]
        inputs=ids.to(device()),
        attention_mask=mask.to(device()),
        output_logits=True,
        return_dict_in_generate=True,
        synced_gpus=sharded,
        **start,
    )
    steps = [logits[0].float().softmax(-1) for logits in output.logits]
    return [(int(step.argmax()), step) for step in steps]


def _distance(left: Sequence[tuple[int, torch.Tensor]], right: Sequence[tuple[int, torch.Tensor]]) -> float:
    """Largest total variation of distributions, as long as the tokens before them are the same."""
    largest = 0.0
    for (token, one), (other, two) in zip(left, right, strict=False):
        largest = max(largest, float((one - two).abs().sum() / 2))
        if token != other:
            break
    return largest


def left_padded(
    prompts: Sequence[npt.NDArray[np.int32]], pad_token_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (S, T) int64; every prompt ends in the last column.

    [[1, 2, 3], [4]] with padding 0 gives ids [[1, 2, 3], [0, 0, 4]] and mask [[1, 1, 1], [0, 0, 1]].
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        mask[row, width - len(prompt) :] = 1
    return ids, mask


@contextmanager
def own_generation_config(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Generates with `config` alone: transformers would fill its gaps from the model's own settings."""
    saved = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = saved
