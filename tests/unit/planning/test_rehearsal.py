"""A rehearsal predicts what the same step allocates for real."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
)

from benchmarks.tiny_models import tiny_config
from dpo.config import ModelConfig
from dpo.data.trees import Tree, tree_batch
from dpo.errors import UserError
from dpo.model.authors import remove_noise
from dpo.model.load import empty_model
from dpo.model.recomputation import recompute
from dpo.model.scorer import SequenceScorer
from dpo.planning.live_bytes import LiveBytes
from dpo.planning.rehearsal import rehearse

MODEL = ModelConfig(name_or_path="", dtype="float32")
GPU = {"dtype": torch.bfloat16, "gpu": True}
SIZES = {"vocab_size": 600, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
FAMILIES: dict[str, PreTrainedConfig] = {
    "gpt2, tied": GPT2Config(vocab_size=600, n_embd=64, n_head=4, n_layer=5, n_positions=128),
    "llama, grouped queries": LlamaConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=5),
    "gemma, two kinds of layers": Gemma3TextConfig(
        **SIZES, num_key_value_heads=2, num_hidden_layers=6, head_dim=16, sliding_window=32
    ),
    "deepseek, dense and experts": tiny_config("deepseek_v3", num_hidden_layers=6, first_k_dense_replace=3),
    "bloom, in rows": BloomConfig(vocab_size=600, hidden_size=64, n_head=4, n_layer=5),
}
for described in FAMILIES.values():
    remove_noise(described)


def trees(number: int) -> list[Tree]:
    one = np.zeros
    return [(one(20 + n, dtype=np.int32), [one(10, dtype=np.int32)] * 2) for n in range(number)]


def measured(config: PreTrainedConfig, model: ModelConfig, data: Sequence[Tree]) -> int:
    """Peak of a real step, without weights and accumulated gradients."""
    bare = empty_model(config, model, dtype=torch.float32)
    recompute(bare, model.gradient_checkpointing)
    bare.train()
    scorer = SequenceScorer(bare)
    for parameter in bare.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    batch = tree_batch(data, scorer.layout)
    with LiveBytes([*bare.parameters(), *bare.buffers()]) as live:
        scorer(batch).sum().backward()
    return live.peak


@pytest.mark.parametrize("checkpointing", [False, "full", "selective"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_predicts_the_peak_of_the_real_step(family: str, checkpointing: Any) -> None:
    model = replace(MODEL, gradient_checkpointing=checkpointing)
    config = FAMILIES[family]
    expected = rehearse(config, model, trees(6), dtype=torch.float32, gpu=False)
    assert expected.peak == pytest.approx(measured(config, model, trees(6)), rel=0.02)


def test_a_gpu_keeps_less_of_attention_and_more_of_a_slice() -> None:
    config = FAMILIES["llama, grouped queries"]
    cpu, gpu = (rehearse(config, MODEL, trees(40), dtype=torch.bfloat16, gpu=on) for on in (False, True))
    assert gpu.activations < cpu.activations
    assert gpu.of_a_block < cpu.of_a_block


def test_a_gpus_projection_holds_one_slice_in_its_own_type_and_the_gradient_of_its_weights() -> None:
    """As its Triton kernels do, which write over the slice; without them it takes four times as much."""
    vocabulary, data = 50_000, trees(40)
    config = GPT2Config(vocab_size=vocabulary, n_embd=64, n_head=4, n_layer=2, n_positions=128)
    trained = sum(len(completion) for _, completions in data for completion in completions)
    expected = 2 * vocabulary * (trained + 64)  # bytes
    assert rehearse(config, MODEL, data, **GPU).projection == pytest.approx(expected, rel=0.05)


def test_routed_experts_can_be_rehearsed() -> None:
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=4, num_local_experts=4)
    assert rehearse(config, MODEL, trees(4), dtype=torch.bfloat16, gpu=True).peak > 0


def test_latent_attention_needs_no_scores_of_all_pairs_on_a_gpu() -> None:
    """Its values are narrower than its keys, for which SDPA on a CPU has no kernel."""
    config = tiny_config("deepseek_v3", v_head_dim=4, max_position_embeddings=4096)
    short, long = (
        rehearse(config, MODEL, [(np.zeros(n, dtype=np.int32), [np.zeros(10, dtype=np.int32)] * 2)], **GPU)
        for n in (500, 4000)
    )
    assert long.activations < 9 * short.activations


REHEARSED = ("jamba", "bamba", "falcon_h1", "recurrent_gemma", "gemma3n_text", "nemotron_h", "qwen3_next")
OTHERS = ("prophetnet", "openai-gpt", "mamba", "gemma4_text", "gpt_oss")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("family", [*REHEARSED, *OTHERS])
def test_every_family_is_rehearsed(family: str, dtype: torch.dtype) -> None:
    config = tiny_config(family)
    remove_noise(config)
    found = rehearse(config, MODEL, trees(2), dtype=dtype, gpu=True)
    assert 0 < found.activations < found.peak


@pytest.mark.parametrize("family", ["jetmoe", "longcat_flash"])
def test_code_that_needs_values_is_refused_in_one_line(family: str) -> None:
    with pytest.raises(UserError, match=r"ForCausalLM cannot be rehearsed without memory \(\w+: aten"):
        rehearse(tiny_config(family), MODEL, trees(1), **GPU)


def test_operations_grow_with_the_blocks_and_not_with_tokens_or_vocabulary() -> None:
    def operations(layers: int, number: int, vocabulary: int = 600) -> int:
        config = GPT2Config(vocab_size=vocabulary, n_embd=64, n_head=4, n_layer=layers, n_positions=128)
        return rehearse(config, MODEL, trees(number), dtype=torch.bfloat16, gpu=True).operations

    of_a_block = operations(3, 4) - operations(2, 4)
    assert 30 < of_a_block < 60
    assert operations(12, 4) == operations(2, 4) + 10 * of_a_block
    assert operations(2, 40) == operations(2, 4)
    assert operations(2, 4, 50_000) == operations(2, 4)  # one slice: a GPU multiplies it at once


def test_the_mask_of_a_gpu_counts_and_is_small() -> None:
    config = FAMILIES["llama, grouped queries"]
    tokens = 128 * 300
    data = [(np.zeros(tokens - 20, dtype=np.int32), [np.zeros(10, dtype=np.int32)] * 2)]
    with_mask = rehearse(config, MODEL, data, dtype=torch.bfloat16, gpu=True)
    without = rehearse(config, replace(MODEL, attention="sdpa"), data, dtype=torch.bfloat16, gpu=True)
    mask = 4 * 300 * 301 * 4
    assert mask <= with_mask.activations
    assert mask < with_mask.activations / 100
    assert without.activations > 0


def test_selective_recomputation_keeps_more_than_full_and_less_than_none() -> None:
    config = FAMILIES["llama, grouped queries"]
    kinds: list[Any] = ["full", "selective", False]
    full, selective, none = (
        rehearse(
            config, replace(MODEL, gradient_checkpointing=kind), trees(20), dtype=torch.float32, gpu=False
        )
        for kind in kinds
    )
    assert 1.5 * full.activations < selective.activations < none.activations / 1.5
