"""A model that only scores and samples: in replicas, or sharded over the ranks by DeepSpeed ZeRO-3."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from dpo import distributed
from dpo.config import ModelConfig
from dpo.data.trees import Tree
from dpo.model.load import DTYPES, load_model, num_parameters
from dpo.model.logprobs import SequenceScorer
from dpo.model.probe import Probed, probe

CPU_TOKENS, GPU_TOKENS = 1024, 16384
"""Of one pass where the config gives none: activations that stay in a CPU's cache, rows that fill a GPU."""


def token_budget(given: int | None) -> int:
    """Tokens of one pass: what the config says, or what was measured to be fast on this kind of device."""
    return given or (GPU_TOKENS if torch.cuda.is_available() else CPU_TOKENS)


def make_scorer(model: PreTrainedModel, config: ModelConfig) -> SequenceScorer:
    """The model as a scorer, with the attention that the config asks for."""
    flex = config.attention == "flex" or (config.attention == "auto" and torch.cuda.is_available())
    scorer = SequenceScorer(model, flex=flex)
    if not config.share_prompts:
        scorer.layouts, scorer.layout = ["rows"], "rows"
    return scorer


def settle_layout(scorer: nn.Module, longest: Tree, dtype: torch.dtype) -> Probed:
    """Tries the layouts that a model may take and settles on the first that is exact, alike on all ranks.

    Args:
        scorer: From `make_scorer` or `frozen_scorer`, wrapped or not.
        longest: The longest prompt with completions that it will meet.
        dtype: The compute type.

    Returns:
        The layout, and what was turned down and why.
    """
    bare = bare_scorer(scorer)
    probed = probe(scorer, bare.layouts, longest, dtype=dtype, device=distributed.device())
    probed = distributed.from_main(probed)
    bare.layout, bare.uses_projection = probed.layout, probed.uses_projection
    return probed


def register_head(scorer: SequenceScorer) -> None:
    """Tells ZeRO-3 that the projection uses the output layer's weights outside that layer."""
    from deepspeed.runtime.zero import register_external_parameter

    for parameter in scorer.projection.head.parameters():
        register_external_parameter(scorer.projection, parameter)


@contextmanager
def frozen_scorer(model: ModelConfig, *, sharded: bool) -> Iterator[nn.Module]:
    """A model that only scores, as a `SequenceScorer` on this process's device; freed at the end of the
    block.

    Args:
        model: Which model, and its compute type.
        sharded: Spread its weights over all ranks with ZeRO-3, also while they load; every rank must then
            make the same number of calls. Otherwise each rank holds a replica.
    """
    if not sharded:
        yield make_scorer(load_model(model), model).to(distributed.device()).eval()
    else:
        import deepspeed  # here, because it looks for compilers and devices, and says so, when it is imported

        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": model.dtype == "bfloat16"},
        }
        sharding = HfDeepSpeedConfig(settings)  # from_pretrained shards while this object lives
        scorer = make_scorer(load_model(model), model)
        del sharding
        sharded_scorer, *_ = deepspeed.initialize(model=scorer, config=settings)
        register_head(scorer)
        sharded_scorer.eval()
        try:
            yield sharded_scorer
        finally:
            sharded_scorer.destroy()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_sharded(choice: Literal["auto", "replicas", "zero3"], model: ModelConfig) -> bool:
    """Whether the ranks are to share one copy of the model; rank 0 decides for all.

    Args:
        choice: What the config says; auto: if the weights need more than half of a device's memory.
        model: Which.
    """
    if distributed.world_size() == 1:  # nobody to share with
        return False
    if choice == "auto":
        return not distributed.on_main(lambda: fits_one_device(model))
    return choice == "zero3"


def bare_scorer(scorer: nn.Module) -> SequenceScorer:
    """What `make_scorer` made, whatever is wrapped around it."""
    bare = scorer if isinstance(scorer, SequenceScorer) else scorer.module
    assert isinstance(bare, SequenceScorer)
    return bare


def fits_one_device(model: ModelConfig) -> bool:
    """Whether the weights take at most half of a device's memory, so that every rank can hold a replica.

    On a CPU the ranks of a node share its memory.
    """
    needed = num_parameters(model) * DTYPES[model.dtype].itemsize
    if torch.cuda.is_available():
        return needed <= torch.cuda.mem_get_info()[1] / 2
    node = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return needed <= node / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / 2
