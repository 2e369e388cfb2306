"""A model as a scorer: attention, layout and batch size that suit the device.

Training and models that only score share it.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from dpo import distributed
from dpo.config import ModelConfig
from dpo.data.trees import Tree, sequence_batch
from dpo.errors import UserError
from dpo.model.compiled import compile_blocks
from dpo.model.first_blocks import enough_blocks, in_float32
from dpo.model.probe import Comparison, Probed, Score, probe
from dpo.model.probe_trees import ProbeTrees
from dpo.model.quantized import num_elements
from dpo.model.scorer import SequenceScorer

CPU_TOKENS, GPU_TOKENS = 1024, 16384
"""Default token budgets: activations that fit a CPU's cache, and enough rows to fill a GPU."""
PROBE_WORK = {"cpu": 3e10, "cuda": 1e13}
"""Most parameters x tokens for which the probe takes the whole model: a pass of about a second."""
COPY_SHARE, FLOAT32_BYTES = 0.5, 4
"""Part of the free memory that the probe's copy in float32 may take; bytes of its weights."""


def token_budget(given: int | None) -> int:
    """Tokens per forward pass: the option, or what was measured to be fast on this kind of device."""
    return given or (GPU_TOKENS if torch.cuda.is_available() else CPU_TOKENS)


def make_scorer(model: PreTrainedModel, config: ModelConfig) -> SequenceScorer:
    """The model as a scorer with the configured attention, compiled if that is asked for."""
    if config.compile:
        compile_blocks(model)
    flex = config.attention == "flex" or (config.attention == "auto" and torch.cuda.is_available())
    scorer = SequenceScorer(model, flex=flex)
    if not config.share_prompts:
        scorer.layouts, scorer.layout = ["rows"], "rows"
    return scorer


def settle_layout(scorer: nn.Module, trees: ProbeTrees, dtype: torch.dtype) -> Probed:
    """Tries a model's layouts and uses the first that is exact, the same on all ranks.

    Args:
        scorer: From `make_scorer` or `frozen_scorer`, wrapped or not.
        trees: Of all data that it will score.
        dtype: The compute type.

    Returns:
        The layout, and which layouts were rejected and why.

    Raises:
        UserError: The model cannot be computed exactly, or is not causal.
    """
    bare = bare_scorer(scorer)
    comparisons, unchecked = _comparisons(scorer, trees, dtype)
    probed = probe(bare.layouts, comparisons)
    if probed.one_at_a_time and _is_sharded(bare):
        probed = replace(probed, refusal="under ZeRO-3 its rows cannot be computed one at a time")
    probed = distributed.from_main(replace(probed, notes=(*unchecked, *probed.notes)))
    if probed.refusal is not None:
        noted = "".join(f"\n  {note}" for note in probed.notes)
        raise UserError(
            f"model.name_or_path: {type(bare.model).__name__} cannot be used: {probed.refusal}{noted}"
        )
    bare.layout, bare.uses_projection = probed.layout, probed.uses_projection
    bare.one_at_a_time = probed.one_at_a_time
    return probed


def _comparisons(
    scorer: nn.Module, trees: ProbeTrees, dtype: torch.dtype
) -> tuple[list[Comparison], tuple[str, ...]]:
    """What a model's layouts are compared with, and notes for people. All ranks must call it.

    The whole model in float32 on the short trees, and on the long ones if that is cheap; its first blocks
    otherwise. A model in another type is also compared with its own noise.
    """
    bare = bare_scorer(scorer)
    compare = partial(Comparison, device=distributed.device(), windows=bare.windows)
    whole: Score | None = scorer if dtype == torch.float32 else None
    if whole is None and _is_cheap(bare, trees.short) and _copy_fits(bare):
        whole = _copied(bare, trees)
    part = None if whole is not None and _is_cheap(bare, trees.long) else _copied(bare, trees, first=True)
    on_short, on_long = whole or part, part or whole
    found, notes = [], []
    if on_short is not None and on_long is not None:
        found += [compare(on_short, trees.short), compare(on_long, trees.long)]
    else:
        notes.append(f"layouts are compared in {dtype} only: no part of this model can be made in float32")
        found.append(compare(scorer, trees.long, exact=False))
    if dtype != torch.float32:
        found.append(compare(scorer, trees.short, exact=False))
    return found, tuple(notes)


def _is_cheap(scorer: SequenceScorer, trees: Sequence[Tree]) -> bool:
    """Whether a pass over these trees with the whole model takes little time."""
    tokens = sum(len(part) for prompt, completions in trees for part in (prompt, *completions))
    return _num_parameters(scorer) * tokens <= PROBE_WORK["cuda" if torch.cuda.is_available() else "cpu"]


def _copy_fits(scorer: SequenceScorer) -> bool:
    """Whether a copy in float32 fits into the free memory; rank 0 decides for all."""
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0]
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return distributed.from_main(FLOAT32_BYTES * _num_parameters(scorer) <= COPY_SHARE * free)


def _num_parameters(scorer: SequenceScorer) -> int:
    return num_elements(scorer.model.parameters())


def _copied(scorer: SequenceScorer, trees: ProbeTrees, *, first: bool = False) -> Score | None:
    """A copy in float32 that works, of all or the first blocks; or None. All ranks must call it."""
    prompt, completions = trees.short[0]
    batch = sequence_batch([(prompt, completions[0])]).to(distributed.device())
    try:
        num_blocks = enough_blocks(scorer.model.config) if first else None
        copy = in_float32(scorer, gathered, num_blocks=num_blocks)
        with torch.no_grad():
            copy(batch, as_written=True)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model's code may raise anything for a config that was not loaded with it
        return None
    return copy


def _is_sharded(scorer: SequenceScorer) -> bool:
    return any(hasattr(parameter, "ds_id") for parameter in scorer.parameters())


def gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[Any]:
    """Within the block the parameters are whole, even under ZeRO-3; all ranks must enter."""
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters  # here: it looks for devices when imported

    whole: AbstractContextManager[Any] = GatheredParameters(sharded)
    return whole


def not_of_text(scorer: SequenceScorer) -> list[str]:
    """Names of weights that no text reaches, such as a vision tower's: DDP would wait for their gradient.

    Args:
        scorer: On any device, not wrapped.
    """
    model, reached = scorer.model, set[nn.Module]()
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if decoder is None or model.config.get_text_config() is model.config:
        return []
    hooks = [part.register_forward_pre_hook(lambda part, _: reached.add(part)) for part in model.modules()]
    with torch.no_grad():
        model(input_ids=torch.arange(1, 5, device=model.device)[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    of_text = {*reached, *decoder.modules(), head}  # its experts may be reached by other tokens
    used = {weight for part in of_text if part is not None for weight in part.parameters(recurse=False)}
    return [name for name, weight in scorer.named_parameters() if weight not in used]


def register_head(scorer: SequenceScorer) -> None:
    """Tells ZeRO-3 that the projection uses the output layer's weights outside of that layer."""
    from deepspeed.runtime.zero import register_external_parameter

    if scorer.projection is None:
        return
    for parameter in scorer.projection.head.parameters():
        register_external_parameter(scorer.projection, parameter)


def bare_scorer(scorer: nn.Module) -> SequenceScorer:
    """The `SequenceScorer` inside an engine's wrapper."""
    bare = scorer if isinstance(scorer, SequenceScorer) else scorer.module
    assert isinstance(bare, SequenceScorer)
    return bare
