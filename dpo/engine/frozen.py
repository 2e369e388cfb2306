"""A model that only scores and samples, as a replica per rank or sharded with DeepSpeed ZeRO-3.

Precompute, evaluation and the cache's audit use it; it is freed at the end of its block.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers.integrations import HfDeepSpeedConfig

from dpo import alive, distributed
from dpo.config import ModelConfig
from dpo.engine.deepspeed_config import without_waiting
from dpo.engine.deepspeed_model import refuse_rounding
from dpo.engine.scoring import make_scorer, register_head
from dpo.model.files import num_parameters
from dpo.model.load import DTYPES, load_model


@contextmanager
def frozen_scorer(model: ModelConfig, *, sharded: bool) -> Iterator[nn.Module]:
    """A `SequenceScorer` on this process's device, freed at the end of the block.

    Args:
        model: Which model, and its compute type.
        sharded: Shard its weights over all ranks with ZeRO-3, also while loading; every rank must then make
            the same number of calls. Otherwise each rank holds a replica.
    """
    alive.loading(f"loading {model.name_or_path}")
    if not sharded:
        yield make_scorer(load_model(model), model).to(distributed.device()).eval()
    else:
        import deepspeed  # here, because it looks for compilers and devices on import, and prints

        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": model.dtype == "bfloat16"},
        }
        without_waiting(settings)
        sharding = HfDeepSpeedConfig(settings)  # from_pretrained shards while this object lives
        scorer = make_scorer(load_model(model), model)
        del sharding
        refuse_rounding(
            scorer.model, DTYPES[model.dtype], "hold replicas (reference.sharding, evaluate.sharding)"
        )
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
    """Whether to shard the model over the ranks; rank 0 decides for all.

    Args:
        choice: The option; auto: if the weights need more than half of a device's memory. Quantized
            weights are never sharded.
        model: Which model.
    """
    if distributed.world_size() == 1 or model.quantization is not None:
        return False
    if choice == "auto":
        return not distributed.on_main(lambda: fits_one_device(model))
    return choice == "zero3"


def fits_one_device(model: ModelConfig) -> bool:
    """Whether the weights take at most half of a device's memory, so that every rank can hold a replica.

    On a CPU the ranks of a node share its memory.
    """
    needed = num_parameters(model) * DTYPES[model.dtype].itemsize
    if torch.cuda.is_available():
        return needed <= torch.cuda.mem_get_info()[1] / 2
    node = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return needed <= node / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / 2
