"""Noise is off in memory, thresholds stay, and an exported config is its author's."""

from pathlib import Path

import pytest
import torch
from families import COMMON
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from dpo.config import ModelConfig
from dpo.model.authors import kept_in_float32, remove_noise
from dpo.model.export import export_model
from dpo.model.load import load_model

MIXTRAL = {**COMMON, "num_local_experts": 4, "router_jitter_noise": 0.1, "attention_dropout": 0.2}
DEEPSEEK = {
    **COMMON,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
}


@pytest.mark.parametrize(
    ("family", "key", "value", "kept"),
    [
        ("mixtral", "router_jitter_noise", 0.1, 0.0),
        ("phimoe", "router_jitter_noise", 0.01, 0.01),
        ("phimoe", "input_jitter_noise", 0.01, 0.0),
        ("gpt2", "resid_pdrop", 0.1, 0.0),
        ("opt", "layerdrop", 0.1, 0.0),
    ],
)
def test_noise_is_removed_by_meaning(family: str, key: str, value: float, kept: float) -> None:
    config = AutoConfig.for_model(family, **{key: value})
    changed = remove_noise(config)
    assert getattr(config, key) == kept
    assert changed.get((key,)) == (value if kept == 0 else None)


def test_what_was_changed_is_listed_with_its_path() -> None:
    config = AutoConfig.for_model("gemma3", text_config={"attention_dropout": 0.25})
    assert remove_noise(config)["text_config", "attention_dropout"] == 0.25
    assert config.text_config.attention_dropout == 0.0


def written(folder: Path, config: PreTrainedConfig, tokenizer: Tokenizer) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_an_exported_config_is_the_authors(tmp_path: Path, tokenizer: Tokenizer) -> None:
    config = AutoConfig.for_model("mixtral", **MIXTRAL, output_router_logits=True)
    written(tmp_path / "given", config, tokenizer)
    model = load_model(ModelConfig(name_or_path=str(tmp_path / "given"), dtype="float32"))
    ours = ("router_jitter_noise", "attention_dropout", "output_router_logits", "use_cache")
    assert [getattr(model.config, key) for key in ours] == [0.0, 0.0, False, False]
    export_model(model, model.state_dict(), tokenizer, tmp_path / "out", "card")
    exported = AutoConfig.from_pretrained(tmp_path / "out")
    assert [getattr(exported, key) for key in ours] == [0.1, 0.2, True, True]
    assert [getattr(model.config, key) for key in ours] == [0.0, 0.0, False, False]


def test_what_the_authors_keep_in_float32_is_named_as_it_is_loaded(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    written(tmp_path / "given", AutoConfig.for_model("deepseek_v3", **DEEPSEEK), tokenizer)
    model = load_model(ModelConfig(name_or_path=str(tmp_path / "given")))
    wide = {name for name, tensor in model.state_dict().items() if tensor.dtype == torch.float32}
    assert wide == kept_in_float32(model, model.state_dict())
    assert wide == {"model.layers.1.mlp.gate.e_score_correction_bias"}
