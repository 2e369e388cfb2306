"""A tiny random model of any causal class of transformers: its default config with small sizes.

Sizes are found by the names of config keys, which families share; what a family alone has is in `OWN`.
"""

import dataclasses
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, POSITIONS, WINDOW = 320, 128, 8
FAMILIES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""Model types with a causal class in the installed transformers."""
HIDDEN, HEADS, HEAD, LAYERS, EXPERTS = 32, 4, 8, 2, 4
SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "embed_dim", "dim_model", "width"),
        HIDDEN,
    ),
    **dict.fromkeys(("lru_width", "emb_dim", "attention_hidden_size", "rnn_hidden_size"), HIDDEN),
    **dict.fromkeys(
        ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "dim_ff", "decoder_ffn_dim", "encoder_ffn_dim"),
        64,
    ),
    **dict.fromkeys(
        (
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "expert_ffn_hidden_size",
            "ffn_hidden_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
            "moe_latent_size",
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "shared_expert_size",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers",
            "n_layer",
            "n_layers",
            "num_layers",
            "decoder_layers",
            "encoder_layers",
            "num_blocks",
            "num_decoder_layers",
        ),
        LAYERS,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads",
            "n_head",
            "n_heads",
            "num_heads",
            "decoder_attention_heads",
            "encoder_attention_heads",
            "linear_num_value_heads",
        ),
        HEADS,
    ),
    **dict.fromkeys(("num_kv_heads", "linear_num_key_heads"), 2),
    **dict.fromkeys(("mamba_num_heads", "mamba_n_heads"), 2 * HEADS),
    **dict.fromkeys(
        (
            "head_dim",
            "v_head_dim",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "attention_head_dim",
            "d_kv",
            "dim_head",
            "global_head_dim",
            "mamba_head_dim",
            "mamba_d_head",
            "swa_head_dim",
            "swa_v_head_dim",
            "index_head_dim",
        ),
        HEAD,
    ),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
        EXPERTS,
    ),
    **dict.fromkeys(
        ("num_experts_per_tok", "moe_topk", "moe_top_k", "num_experts_per_token", "top_k_experts", "moe_k"), 2
    ),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_groups"), 1),
    **dict.fromkeys(
        (
            "max_position_embeddings",
            "n_positions",
            "n_ctx",
            "max_seq_len",
            "max_sequence_length",
            "context_length",
            "model_max_length",
            "max_target_positions",
        ),
        POSITIONS,
    ),
    **dict.fromkeys(
        ("sliding_window", "attention_window_size", "window_size", "sliding_window_size"), WINDOW
    ),
    **dict.fromkeys(("index_topk", "attention_chunk_size", "index_topk_blocks"), WINDOW),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("mamba_dt_rank", "time_step_rank", "mamba_n_groups", "n_groups", "index_n_heads"), 2),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), 1),
    **dict.fromkeys(("pad_token_id",), 0),
    **dict.fromkeys(("bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id"), 1),
    **dict.fromkeys(("initializer_range", "init_std", "initializer_factor", "initializer_std"), 0.2),
    "hidden_size_per_layer_input": 8,
    "mlp_only_layers": [],
    "rotary_dim": 4,
    "use_cache": True,
    "num_nextn_predict_layers": 0,
}
"""Name of a config key -> its small value, where a config has it."""
BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "no_rope_layers")
"""Keys with a value per layer; of each distinct value one layer is kept."""
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OWN: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROPE)},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "intermediate_size": 64,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.5, 0.0],
        "laurel_rank": 8,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD,
        "indexer_budget": WINDOW,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 64,
        "split_ngram_parts": 2,
        "ple_embed_dim": HIDDEN,
        "hc_lowrank": 8,
    },
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    "roc_bert": {"pronunciation_vocab_size": 40, "shape_vocab_size": 40},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD,
        "num_key_value_heads": HEADS,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(family: str, **sizes: int) -> PreTrainedConfig:
    """The family's default config with small sizes, or with those that are given."""
    small = _small(AutoConfig.for_model(family), family)
    config: PreTrainedConfig = AutoConfig.for_model(family, **small | sizes)
    return config


def _small(config: Any, family: str) -> dict[str, Any]:
    """Arguments of a config's class, small; what it derives from them is left to it."""
    values = {field.name: vars(config).get(field.name) for field in dataclasses.fields(config)}
    kept, small = _layers(vars(config)), dict[str, Any]()
    heads = HEADS if "kv_lora_rank" in values else HEADS // 2  # latent attention has one key per head
    for key, value in values.items():
        if hasattr(value, "to_dict"):
            small[key] = {"model_type": value.model_type, **_small(value, value.model_type)}
        elif key in BY_LAYER and isinstance(value, list):
            small[key] = [value[number] for number in kept]
        elif key == "num_key_value_heads":
            small[key] = heads
        elif key in SIZES and (value is not None or key == "head_dim"):
            small[key] = (
                len(kept) if SIZES[key] == LAYERS and ("layer" in key or "block" in key) else SIZES[key]
            )
    return small | OWN.get(family, {})


def _layers(values: dict[str, Any]) -> list[int]:
    """The layers to keep: the first of each kind, and at least `LAYERS`."""
    lists = [values[key] for key in BY_LAYER if isinstance(values.get(key), list) and values[key]]
    if not lists:
        return list(range(LAYERS))
    kinds = list(zip(*lists, strict=False))
    first = sorted({kinds.index(kind) for kind in kinds})
    return first if len(first) >= LAYERS else list(range(LAYERS))


def tiny_model(family: str, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A random model of the family, far from uniform: a wrong token changes log-probs by a lot."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config or tiny_config(family), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.min() == parameter.max():  # at zeros or ones a forgotten bias would not be noticed
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.eval()
    return model
