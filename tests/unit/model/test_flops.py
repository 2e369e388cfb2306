"""Operations by hand, and the peaks of devices."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from benchmarks.tiny_models import tiny_config
from dpo.data.dataset import map_dataset, write_dataset
from dpo.data.records import Pair, TokenizedGroup
from dpo.model.flops import forward_flops, known_peak, work_of


def group(prompt: int, *completions: int) -> TokenizedGroup:
    return TokenizedGroup(
        prompt=np.arange(prompt, dtype=np.int32),
        completions=tuple(np.arange(1, number + 1, dtype=np.int32) for number in completions),
        pairs=(Pair(0, 1),),
    )


def test_flops_of_groups_by_hand(tmp_path: Path) -> None:
    config = GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=100)
    with torch.device("meta"):
        work = work_of(GPT2LMHeadModel(config))
    write_dataset([group(2, 3, 1), group(1, 1, 1)], tmp_path / "data", Counter())
    found = forward_flops(map_dataset(tmp_path / "data", ""), work)
    # 2 + 3 + 1 tokens; the prompt's attend to 1 + 2, the completions' to 3 + 4 + 5 and 3
    trunk = 6 * 2 * (3 * 12 * 64 * 64)
    attention = (1 + 2 + 3 + 4 + 5 + 3) * 4 * 64 * 3
    head = 4 * 2 * 100 * 64
    assert found[0] == trunk + attention + head
    assert found[1] == 3 * 2 * (3 * 12 * 64 * 64) + (1 + 2 + 2) * 4 * 64 * 3 + 2 * 2 * 100 * 64


def test_grouped_queries_make_smaller_matrices_and_equal_attention() -> None:
    options = {"hidden_size": 64, "intermediate_size": 100, "num_attention_heads": 4, "num_hidden_layers": 2}
    with torch.device("meta"):
        work = work_of(LlamaForCausalLM(LlamaConfig(**options, num_key_value_heads=1, vocab_size=50)))
    assert work.token == 2 * (2 * 64 * 64 + 2 * 16 * 64 + 3 * 64 * 100)
    assert work.seen == 2 * 2 * 64
    assert work.prediction == 50 * 64


def test_a_token_is_counted_for_the_experts_that_it_is_routed_to() -> None:
    options = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1}
    config = MixtralConfig(**options, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2)
    with torch.device("meta"):
        work = work_of(MixtralForCausalLM(config))
    assert work.token == 4 * 64 * 64 + 8 * 64 + 2 * 3 * 64 * 96


def test_a_sharded_weight_counts_whole() -> None:
    config = GPT2Config(n_embd=64, n_layer=1, n_head=4, vocab_size=100)
    model = GPT2LMHeadModel(config)
    whole = work_of(model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # as under ZeRO-3: the shape is kept, the data is elsewhere
        parameter.data = torch.empty(0)
    assert work_of(model) == whole


def test_a_model_without_a_list_of_blocks_cannot_be_counted() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=10))
    model.transformer.h = torch.nn.Sequential(*model.transformer.h)
    with pytest.raises(ValueError, match="ModuleList"):
        work_of(model)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA A100-SXM4-80GB", 312.0)],
)
def test_common_gpus_have_a_peak(name: str, tflops: float) -> None:
    assert known_peak(name) == tflops * 1e12
    assert known_peak("A chip of next year") is None


@pytest.mark.parametrize(
    ("family", "widths"),
    [("mamba", []), ("lfm2", [8]), ("jamba", []), ("gemma4_text", [8, 512]), ("llama", [8, 8])],
)
def test_attention_is_counted_in_the_blocks_that_have_it(family: str, widths: list[int]) -> None:
    config = tiny_config(family)
    with torch.device("meta"):
        work = work_of(AutoModelForCausalLM.from_config(config))
    assert work.token > 0
    assert work.seen == 2 * 4 * sum(widths)  # of four heads


def test_active_experts_are_read_by_any_of_their_names() -> None:
    for family in ("aria_text", "gemma4_text", "deepseek_v3"):
        config = tiny_config(family)
        if family == "gemma4_text":
            config.enable_moe_block, config.num_experts, config.top_k_experts = True, 4, 2
            config.moe_intermediate_size = 32
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        whole = sum(p.numel() for b in model.model.layers for p in b.parameters() if p.ndim > 1)
        experts = sum(p.numel() for b in model.model.layers for p in b.parameters() if p.ndim == 3)
        assert experts > 0
        assert work_of(model).token == whole - experts // 2
