"""New models: shape from the config file, vocabulary and special tokens from the tokenizer."""

import json
from pathlib import Path

import pytest
import torch

from dpo.config import ScratchConfig
from dpo.errors import UserError
from dpo.model.from_scratch import END_OF_TEXT, scratch_model, scratch_positions, scratch_tokenizer

LINES = ["the cat sat on the mat", "naïve café ☕", "a good day"] * 5
SHAPE = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "embd_pdrop": 0.1}


@pytest.fixture
def scratch(tmp_path: Path) -> ScratchConfig:
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(SHAPE))
    return ScratchConfig(config=str(path), vocab_size=280)


def test_the_tokenizer_restores_any_text_and_has_one_special_token(scratch: ScratchConfig) -> None:
    tokenizer = scratch_tokenizer(scratch, LINES)
    for text in [*LINES, " two  spaces\n\ttabs", "漢字 \x00 🙂"]:
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.bos_token == tokenizer.eos_token == END_OF_TEXT
    assert len(tokenizer) <= 280
    assert len(tokenizer(LINES[0]).input_ids) < len(LINES[0])  # merges were learned
    assert END_OF_TEXT not in tokenizer.decode(tokenizer("the cat").input_ids)


def test_a_named_tokenizer_is_used_instead(scratch: ScratchConfig, tiny_model: Path, tmp_path: Path) -> None:
    named = ScratchConfig(config=scratch.config, tokenizer=str(tiny_model))
    assert len(scratch_tokenizer(named, [])) == 299
    missing = ScratchConfig(config=scratch.config, tokenizer=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"model\.scratch\.tokenizer: "):
        scratch_tokenizer(missing, [])


def make(scratch: ScratchConfig, seed: int = 0) -> torch.nn.Module:
    tokenizer = scratch_tokenizer(scratch, LINES)
    return scratch_model(scratch, tokenizer, seed=seed, dtype=torch.float32, attention="sdpa")


def test_the_model_has_the_files_shape_and_the_tokenizers_vocabulary(scratch: ScratchConfig) -> None:
    tokenizer = scratch_tokenizer(scratch, LINES)
    model = scratch_model(scratch, tokenizer, seed=0, dtype=torch.bfloat16, attention="sdpa")
    assert model.config.model_type == "gpt2"
    assert model.get_input_embeddings().weight.shape == (len(tokenizer), 16)
    assert (model.config.n_layer, model.config.n_positions, model.config.embd_pdrop) == (1, 32, 0.0)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 0)
    assert model.dtype == torch.bfloat16


def test_the_seed_decides_the_weights(scratch: ScratchConfig) -> None:
    first, again, other = make(scratch), make(scratch), make(scratch, seed=1)
    for mine, same in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, same)
    differing = [not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)]
    assert any(differing)


def test_positions_come_from_the_file(scratch: ScratchConfig) -> None:
    assert scratch_positions(scratch) == 32


@pytest.mark.parametrize("content", ["{", "[]", '{"n_embd": 16}', None])
def test_a_file_that_is_not_a_config_is_refused(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "shape.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"model\.scratch\.config: .*model_type"):
        scratch_positions(ScratchConfig(config=str(path)))


def test_an_unknown_type_of_model_is_refused(scratch: ScratchConfig, tmp_path: Path) -> None:
    path = tmp_path / "unknown.json"
    path.write_text('{"model_type": "no_such_type"}')
    with pytest.raises(UserError, match=r"model\.scratch\.config: .*unknown\.json"):
        make(ScratchConfig(config=str(path), vocab_size=280))
