"""Tiny random models of common families, with windows shorter than the tests' sequences."""

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpo.data.records import TokenIds
from dpo.data.trees import Tree
from dpo.model.attention import restore_attention
from dpo.model.authors import remove_noise
from dpo.model.load import ready

VOCABULARY = 97
WINDOW = 7
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # far from uniform: attending to a wrong token changes log-probs by nats
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN_NAMES = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2}
GEMMA = {**COMMON, "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 8}
TREES = {
    "gpt2": {**OWN_NAMES, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "llama": COMMON,
    "qwen2": COMMON,
    "qwen3": {**COMMON, "head_dim": 8},
    "gpt_neox": {key: value for key, value in COMMON.items() if key != "num_key_value_heads"},
    "opt": {**COMMON, "ffn_dim": 64, "init_std": 0.3, "word_embed_proj_dim": 16},
    "falcon": {**COMMON, "num_kv_heads": 1},
    "phi": {**COMMON, "num_key_value_heads": 4},  # its head has a bias
    "olmo2": COMMON,
    "mixtral": {**COMMON, "num_local_experts": 4},
    "mistral": {**COMMON, "sliding_window": WINDOW},
    "gemma2": {**GEMMA, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
    "cohere": {**COMMON, "logit_scale": 0.3},
    "granite": {**COMMON, "logits_scaling": 3.0},
}
ROWS = {
    "bloom": {**OWN_NAMES, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {**OWN_NAMES, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
}


def tiny(family: str, attention: str | None = None, **sizes: int) -> PreTrainedModel:
    """A model of the family as `load_model` would give it; `sizes` replace those that it has."""
    torch.manual_seed(0)
    own = (TREES | ROWS)[family]
    replaced = {key: size for key, size in sizes.items() if key in own}
    config = AutoConfig.for_model(family, **own | replaced)
    remove_noise(config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they start at zero, where a forgotten bias would not be noticed
            torch.nn.init.normal_(parameter, std=0.3)
    return ready(model)


def random_ids(rng: np.random.Generator, length: int) -> TokenIds:
    return rng.integers(3, VOCABULARY, length).astype(np.int32)


def random_tree(rng: np.random.Generator, num_completions: int, longest: int = 30) -> Tree:
    """A prompt and completions of uneven length."""
    lengths = rng.integers(1, longest, num_completions)
    return random_ids(rng, int(rng.integers(1, longest))), [random_ids(rng, int(n)) for n in lengths]


def naive_logps(model: PreTrainedModel, trees: list[Tree]) -> Tensor:
    """(N,) log-probs: one sequence at a time, nothing shared, softmax over the model's own logits."""
    found = []
    restore_attention(model)
    for prompt, completions in trees:
        for completion in completions:
            ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            found.append(-F.cross_entropy(logits, ids[0, len(prompt) :], reduction="none"))
    return torch.cat(found)
