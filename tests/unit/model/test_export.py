"""An exported folder loads as the model that was exported, tied embeddings included; complete or absent."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel
from transformers import PreTrainedTokenizerFast as Tokenizer

from dpo.config import ModelConfig
from dpo.data.trees import sequence_batch
from dpo.model.export import export_model
from dpo.model.load import load_model
from dpo.model.scorer import SequenceScorer


def tiny(*, tied: bool) -> PreTrainedModel:
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=299,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    return GPT2LMHeadModel(config).eval()


def logps(model: PreTrainedModel) -> torch.Tensor:
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 299, 9).astype(np.int32) for _ in range(8)]
    with torch.no_grad():
        return SequenceScorer(model)(sequence_batch([(one[:4], one[4:]) for one in ids]))


@pytest.mark.parametrize("tied", [True, False])
def test_a_reloaded_model_gives_equal_log_probs(tied: bool, tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = tiny(tied=tied)
    export_model(model, model.state_dict(), tokenizer, tmp_path / "model", "card")
    ours = load_model(ModelConfig(name_or_path=str(tmp_path / "model"), dtype="float32"))
    torch.testing.assert_close(logps(ours), logps(model), rtol=0, atol=1e-4)  # its gelu is a fused one
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert theirs.config.tie_word_embeddings is tied
    assert theirs.config.use_cache is True  # for generation
    assert model.config.use_cache is False  # for the rest of the training
    assert torch.equal(logps(theirs.eval()), logps(model))


def test_weights_in_a_narrower_type_are_what_is_saved(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = tiny(tied=True)
    narrow = {name: weight.to(torch.bfloat16) for name, weight in model.state_dict().items()}
    export_model(model, narrow, tokenizer, tmp_path / "model", "card")
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in saved  # tied: it is saved once, as the embedding
    again = load_model(ModelConfig(name_or_path=str(tmp_path / "model"), dtype="bfloat16"))
    assert torch.equal(again.state_dict()["lm_head.weight"], narrow["transformer.wte.weight"])


def test_the_folder_is_complete_and_replaces_an_older_one(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old.bin").write_text("old")
    export_model(tiny(tied=True), tiny(tied=True).state_dict(), tokenizer, folder, "# The card")
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "old.bin" not in names
    assert (folder / "README.md").read_text() == "# The card"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert AutoTokenizer.from_pretrained(folder)("the cat").input_ids == tokenizer("the cat").input_ids


def test_after_an_error_the_older_folder_is_as_it_was(tmp_path: Path, tokenizer: Tokenizer) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old.bin").write_text("old")
    model = tiny(tied=True)
    with pytest.raises(AttributeError):
        export_model(model, {"transformer.wte.weight": None}, tokenizer, folder, "card")  # type: ignore[dict-item]
    assert model.config.use_cache is False
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (folder / "old.bin").read_text() == "old"


def test_a_link_to_a_large_disk_stays_a_link(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "disk" / "model").mkdir(parents=True)
    (tmp_path / "model").symlink_to(tmp_path / "disk" / "model")
    export_model(tiny(tied=True), tiny(tied=True).state_dict(), tokenizer, tmp_path / "model", "card")
    assert (tmp_path / "model").is_symlink()
    assert (tmp_path / "disk" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_permissions_of_the_umask(
    tmp_path: Path, tokenizer: Tokenizer, umask: int, mode: int
) -> None:
    before = os.umask(umask)
    try:
        export_model(tiny(tied=True), tiny(tied=True).state_dict(), tokenizer, tmp_path / "model", "card")
    finally:
        os.umask(before)
    files = list((tmp_path / "model").iterdir())
    assert "model.safetensors" in [path.name for path in files]
    assert {path.stat().st_mode & 0o777 for path in files} == {mode}


def test_sampling_settings_that_transformers_would_not_save_do_not_lose_the_model(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    model = tiny(tied=True)
    assert model.generation_config is not None
    model.generation_config.temperature = 0.6  # without do_sample, as some base models come
    export_model(model, model.state_dict(), tokenizer, tmp_path / "model", "card")
    saved = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert (saved["temperature"], saved["do_sample"]) == (0.6, True)
