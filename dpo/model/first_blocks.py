"""A model, or its first blocks, in float32 beside the model: for the probe.

In bfloat16 the rounding of a deep model is as large as the error of a mask that hides a token. In float32 it
is a thousand times smaller. The copy has the model's own code, weights, buffers and mode. It lacks an
adapter, on which masks and positions do not depend.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig

from dpo.model.adapter import ADAPTED
from dpo.model.attention import restore_attention
from dpo.model.load import ready
from dpo.model.quantized import plain
from dpo.model.scorer import SequenceScorer

LEAST_BLOCKS = 2
"""An error in one block's attention reaches the log-probs through the next, too."""
Gather = Callable[[Sequence[nn.Parameter]], AbstractContextManager[Any]]


def in_float32(
    scorer: SequenceScorer,
    gathered: Gather = lambda parameters: nullcontext(),
    *,
    num_blocks: int | None = None,
) -> Callable[..., Tensor]:
    """The scoring function of a copy in float32; see `SequenceScorer.forward`.

    Args:
        scorer: Of the whole model. Its layouts, attention and projection are those of the copy.
        gathered: Within its block these parameters are whole, where ZeRO-3 shards them.
        num_blocks: Where the copy ends; None at the model's end.

    Raises:
        Exception: The model's class cannot be made from its config alone, or its blocks are not in a list.
    """
    model = scorer.model
    restore_attention(model)  # the copy's class knows the authors' names only
    with torch.device("meta"):
        copy = ready(type(model)(deepcopy(model.config)))
    if num_blocks is not None:
        _cut(copy, num_blocks)
    sources = {ADAPTED.sub(".", name): weight for name, weight in _weights(model)}
    named = [(name, sources[name]) for name, _ in _weights(copy)]
    tensors = {f"model.{name}": _widened(buffer) for name, buffer in model.named_buffers()}
    with gathered([weight for _, weight in named]), torch.no_grad():
        widened = {weight: plain(weight).detach().float() for _, weight in named}  # tied weights once
    tensors |= {f"model.{name}": widened[weight] for name, weight in named}
    short = SequenceScorer(copy, flex="flex" in scorer.layouts)
    learning = {name for name, module in model.named_modules() if module.training}
    for name, module in copy.named_modules():
        module.training = name in learning
    known = {f"model.{name}" for name, _ in (*_weights(copy), *copy.named_buffers())}
    tensors = {name: tensor for name, tensor in tensors.items() if name in known}

    def score(*inputs: Any, **options: Any) -> Tensor:
        logps: Tensor = functional_call(short, tensors, inputs, options, tie_weights=False)
        return logps

    return score


def _widened(buffer: Tensor) -> Tensor:
    return buffer.float() if buffer.is_floating_point() else buffer


def enough_blocks(config: PreTrainedConfig) -> int:
    """How many blocks it takes to have each type of layer once, at least `LEAST_BLOCKS` if there are as many.

    Args:
        config: Of the model.
    """
    config = config.get_text_config()
    types = list(getattr(config, "layer_types", None) or [])
    last_new = max((types.index(kind) for kind in set(types)), default=0)
    return min(max(LEAST_BLOCKS, last_new + 1), int(config.num_hidden_layers))


def _weights(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(model.named_parameters(remove_duplicate=False))


def _cut(model: nn.Module, length: int) -> None:
    """Shortens the model's list of blocks, its first list."""
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, nn.ModuleList):
                setattr(parent, name, child[:length])
                return
    raise ValueError(f"{type(model).__name__}: expected blocks in a ModuleList")
