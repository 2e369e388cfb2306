"""Fixtures of the tests with real ranks."""

import json
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="session")
def untied(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with grouped-query attention, an untied output layer and the tiny model's tokenizer."""
    folder = tmp_path_factory.mktemp("untied")
    vocabulary = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tiny_model / name).read_bytes())
    return folder
