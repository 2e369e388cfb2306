"""Models with random weights, groups with the lengths of real ones, and clocks, for the prepared run."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from dpo.data.records import Pair, TokenizedGroup
from dpo.data.trees import Layout, TreeBatch, group_batch
from dpo.model.authors import remove_noise
from dpo.model.flops import Work
from dpo.model.load import ready

LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
LLAMA_8B: dict[str, Any] = {
    **LLAMA_1B,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 6,
    "tie_word_embeddings": False,
}
"""Six of its 32 blocks: with masters and moments in float32 more would not fit one card."""
TINY: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def configs(*, rehearse: bool) -> dict[str, PreTrainedConfig]:
    """Name -> configuration of the models that are measured."""
    if rehearse:
        return {"tiny llama": LlamaConfig(**TINY)}
    return {
        "GPT-2, 124M": GPT2Config(),
        "Llama, 1.2B": LlamaConfig(**LLAMA_1B),
        "Llama, 6 of 32 blocks of 8B": LlamaConfig(**LLAMA_8B),
    }


def random_model(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> PreTrainedModel:
    """A model without a checkpoint, made on the device.

    Args:
        config: Its sizes.
        dtype: Of its weights.
        device: Where it is made.
        seed: Of its weights.
    """
    remove_noise(config)
    torch.manual_seed(seed)
    with device:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=dtype
        )
    return ready(model)


def groups_of(tokens: int, vocabulary: int, seed: int = 0, longest: int = 512) -> list[TokenizedGroup]:
    """Pairs with lengths like those of HH, of about `tokens` tree tokens together.

    Args:
        tokens: Of all trees.
        vocabulary: Number of token ids.
        seed: Of lengths and ids.
        longest: Longest prompt and completion together.
    """
    rng, found, total = np.random.default_rng(seed), list[TokenizedGroup](), 0
    while True:
        prompt, *completions = (
            int(np.clip(rng.lognormal(mean, 0.7), 4, longest // 2)) for mean in (4.7, 4.0, 4.0)
        )
        total += prompt + sum(completions)
        if total > tokens and found:
            return found
        ids = [rng.integers(3, vocabulary, length).astype(np.int32) for length in (prompt, *completions)]
        found.append(TokenizedGroup(prompt=ids[0], completions=tuple(ids[1:]), pairs=(Pair(0, 1),)))


def batch_of(
    groups: Sequence[TokenizedGroup],
    layout: Layout,
    device: torch.device,
    windows: Sequence[int | None] = (None,),
) -> TreeBatch:
    """A micro-batch for preference training with a reference of zeros."""
    batch = group_batch(groups, layout)
    batch = replace(
        batch,
        reference=torch.zeros(len(batch.num_tokens), dtype=torch.float64),
        pair_weights=torch.ones(len(batch.pairs), dtype=torch.float64),
        loss_count=float(len(batch.pairs)),
    )
    return batch.to(device, windows)


def training_flops(groups: Sequence[TokenizedGroup], work: Work) -> float:
    """Useful operations of a forward and backward pass; see `dpo.model.flops.forward_flops`."""
    total = 0.0
    for group in groups:
        prompt, completions = len(group.prompt), [*map(len, group.completions)]
        seen = prompt * (prompt + 1) / 2 + sum(prompt * own + own * (own + 1) / 2 for own in completions)
        total += work.token * (prompt + sum(completions)) + work.seen * seen
        total += work.prediction * sum(completions)
    return 3 * 2 * total


def seconds_of(run: Callable[[], object], repeats: int = 5, warm_ups: int = 2) -> float:
    """Median seconds of a piece of work, until the device has finished it."""
    for _ in range(warm_ups):
        run()
    found = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        run()
        wait()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def wait() -> None:
    """Waits for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], object]) -> float:
    """Most bytes that are allocated on the card while `run` works, above what was there before; 0 on CPUs."""
    if not torch.cuda.is_available():
        run()
        return 0.0
    wait()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    wait()
    return float(torch.cuda.max_memory_allocated() - before)
