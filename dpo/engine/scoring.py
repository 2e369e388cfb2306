"""A model as a scorer: attention, layout and batch size that suit the device.

Training and models that only score share it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo import distributed
from dpo.config import ModelConfig
from dpo.data.trees import Tree
from dpo.model.first_blocks import first_blocks
from dpo.model.probe import Probed, probe
from dpo.model.scorer import SequenceScorer

CPU_TOKENS, GPU_TOKENS = 1024, 16384
"""Default token budgets: activations that fit a CPU's cache, and enough rows to fill a GPU."""


def token_budget(given: int | None) -> int:
    """Tokens per forward pass: the option, or what was measured to be fast on this kind of device."""
    return given or (GPU_TOKENS if torch.cuda.is_available() else CPU_TOKENS)


def make_scorer(model: PreTrainedModel, config: ModelConfig) -> SequenceScorer:
    """The model as a scorer with the configured attention."""
    flex = config.attention == "flex" or (config.attention == "auto" and torch.cuda.is_available())
    scorer = SequenceScorer(model, flex=flex)
    if not config.share_prompts:
        scorer.layouts, scorer.layout = ["rows"], "rows"
    return scorer


def settle_layout(scorer: nn.Module, longest: Tree, dtype: torch.dtype) -> Probed:
    """Tries a model's layouts and uses the first that is exact, the same on all ranks.

    Args:
        scorer: From `make_scorer` or `frozen_scorer`, wrapped or not.
        longest: The longest prompt with completions that it will score.
        dtype: The compute type.

    Returns:
        The layout, and which layouts were rejected and why.
    """
    bare = bare_scorer(scorer)
    precise, unchecked = _precise(bare) if dtype != torch.float32 and len(bare.layouts) > 1 else (None, ())
    probed = probe(scorer, bare.layouts, longest, dtype=dtype, device=distributed.device(), precise=precise)
    probed = distributed.from_main(replace(probed, notes=(*unchecked, *probed.notes)))
    bare.layout, bare.uses_projection = probed.layout, probed.uses_projection
    return probed


def _precise(scorer: SequenceScorer) -> tuple[Callable[..., Tensor] | None, tuple[str, ...]]:
    """The first blocks in float32; or why there are none, as a note for people. All ranks must call it."""
    try:
        return first_blocks(scorer, gathered), ()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's code may raise anything for a config that was not loaded with it
        reason = f"{type(error).__name__}: {error}"
        return None, (f"layouts are compared in bfloat16 only: no part of the model in float32 ({reason})",)


def gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Within the block the parameters are whole, even under ZeRO-3; all ranks must enter."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters  # here: it looks for devices when imported

    whole: AbstractContextManager[Any] = GatheredParameters(sharded)
    return whole


def register_head(scorer: SequenceScorer) -> None:
    """Tells ZeRO-3 that the projection uses the output layer's weights outside of that layer."""
    from deepspeed.runtime.zero import register_external_parameter

    for parameter in scorer.projection.head.parameters():
        register_external_parameter(scorer.projection, parameter)


def bare_scorer(scorer: nn.Module) -> SequenceScorer:
    """The `SequenceScorer` inside an engine's wrapper."""
    bare = scorer if isinstance(scorer, SequenceScorer) else scorer.module
    assert isinstance(bare, SequenceScorer)
    return bare
