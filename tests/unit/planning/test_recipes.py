"""Every published recipe goes through `dpo check` and `dpo plan`, with a model of its family at hand.

The hub is out of reach in tests: `check` gets a small model with weights and a few pairs, `plan` the
published sizes without weights.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from unit.planning.conftest import Planned

from dpo.cli.main import run
from dpo.cli.parse import parse
from dpo.config import Config, DataSource, LossConfig, sources_of
from dpo.engine.schedule import learning_rate

RECIPES = {path.stem: path for path in (Path(__file__).parents[3] / "configs" / "recipes").glob("*.yaml")}
NORMALISED = LossConfig(type="sigmoid_norm", beta=5.0)
SIMPO = LossConfig(type="simpo", beta=10.0, simpo_gamma=3.0)
Numbers = tuple[LossConfig, float, str, int, int]
NUMBERS: dict[str, Numbers] = {
    "tulu_3_8b": (NORMALISED, 5e-7, "linear", 128, 2048),
    "tulu_3_70b": (NORMALISED, 2e-7, "linear", 128, 2048),
    "olmo_2_7b": (NORMALISED, 1e-6, "linear", 128, 2048),
    "olmo_2_13b": (NORMALISED, 8e-7, "linear", 128, 2048),
    "olmo_3_7b_instruct": (NORMALISED, 1e-6, "linear", 128, 16384),
    "zephyr_7b": (LossConfig(beta=0.01), 5e-7, "cosine", 128, 1024),
    "smollm3_3b": (LossConfig(type="apo_zero", beta=0.05), 1e-6, "cosine", 32, 24576),
    "simpo_llama_3_8b": (SIMPO, 1e-6, "cosine", 128, 2048),
    "simpo_gemma_2_9b": (LossConfig(type="simpo", beta=10.0, simpo_gamma=5.0), 8e-7, "cosine", 128, 2048),
    "mpo_qwen_2.5_7b": (
        LossConfig(type=["sigmoid", "bco_pair", "sft"], weights=[0.8, 0.2, 1.0]), 1e-6, "cosine", 256, 8192,
    ),
}  # fmt: skip
"""Name -> loss, peak learning rate, schedule, pairs per step, longest sequence."""
LLAMA = {"model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072}
LLAMA |= {"num_key_value_heads": 8, "tie_word_embeddings": False}
L8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_hidden_layers": 32}
L70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80}
OLMO = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_hidden_layers": 32}
OLMO |= {"num_key_value_heads": 32, "max_position_embeddings": 4096, "tie_word_embeddings": False}
O13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40}
MODELS: dict[str, tuple[dict[str, Any], float]] = {
    "tulu_3_8b": ({**LLAMA, **L8B, "vocab_size": 128264}, 8030e6),
    "tulu_3_70b": ({**LLAMA, **L70B, "vocab_size": 128264}, 70554e6),
    "olmo_2_7b": ({**OLMO, "model_type": "olmo2", "vocab_size": 100352}, 7299e6),
    "olmo_2_13b": (
        {**OLMO, **O13B, "model_type": "olmo2", "num_key_value_heads": 40, "vocab_size": 100352},
        13716e6,
    ),
    "olmo_3_7b_instruct": (
        {**OLMO, "model_type": "olmo3", "vocab_size": 100278, "max_position_embeddings": 65536},
        7298e6,
    ),
    "zephyr_7b": (
        {**L8B, "model_type": "mistral", "num_key_value_heads": 8, "vocab_size": 32000,
         "max_position_embeddings": 32768, "tie_word_embeddings": False},
        7242e6,
    ),
    "smollm3_3b": (
        {"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16,
         "num_hidden_layers": 36, "num_key_value_heads": 4, "vocab_size": 128256,
         "max_position_embeddings": 65536, "tie_word_embeddings": True},
        3075e6,
    ),
    "simpo_llama_3_8b": ({**LLAMA, **L8B, "max_position_embeddings": 8192}, 8030e6),
    "simpo_gemma_2_9b": (
        {"model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
         "num_hidden_layers": 42, "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000,
         "max_position_embeddings": 8192, "tie_word_embeddings": True},
        9242e6,
    ),
    "mpo_qwen_2.5_7b": (
        {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28,
         "num_hidden_layers": 28, "num_key_value_heads": 4, "vocab_size": 152064,
         "max_position_embeddings": 32768, "tie_word_embeddings": False},
        7616e6,
    ),
}  # fmt: skip
"""Name -> the sizes of the model that is trained, and its published number of parameters."""


def read(name: str) -> Config:
    config = parse("train", ["--config", str(RECIPES[name])])
    assert isinstance(config, Config)
    return config


def test_every_recipe_is_tested() -> None:
    assert RECIPES.keys() == NUMBERS.keys() == MODELS.keys()


@pytest.mark.parametrize("name", NUMBERS)
def test_the_numbers_are_the_published_ones(name: str) -> None:
    config = read(name)
    loss, rate, schedule, pairs, longest = NUMBERS[name]
    train = config.train
    assert config.loss == loss
    assert (train.learning_rate, train.schedule, train.pairs_per_step) == (rate, schedule, pairs)
    assert (config.data.max_length, train.num_epochs, train.optimizer) == (longest, 1, "adamw")
    assert (train.warmup_ratio, train.weight_decay) == (
        (0.03, 0.05) if name.startswith("mpo") else (0.1, 0.0)
    )
    assert train.max_grad_norm == (0.2 if name == "smollm3_3b" else 1.0)
    warm = 3 if name.startswith("mpo") else 10
    rates = [learning_rate(step, 100, train) for step in (1, warm, warm + 1)]
    assert rates == pytest.approx([rate / warm, rate, rate])
    assert learning_rate(101, 100, train) == pytest.approx(
        rate / 10 if name == "smollm3_3b" else 0, abs=1e-12
    )


@pytest.mark.parametrize("name", NUMBERS)
def test_a_recipe_names_its_source_and_data_of_the_hub(name: str) -> None:
    text, config = RECIPES[name].read_text(), read(name)
    assert re.search(r"^# Source: [\w-]+/[\w-]+, \S+", text, re.MULTILINE), text
    assert f"CONFIG=configs/recipes/{name}.yaml" in text
    assert config.run_dir == f"runs/{name}"
    for source in sources_of(config.data.train):
        assert isinstance(source, DataSource)
        assert re.fullmatch(r"[\w-]+/[\w.-]+", source.path)


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Weights of a model with room for the longest recipe."""
    folder = tmp_path_factory.mktemp("small_llama")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=300, max_position_embeddings=65536)).save_pretrained(
        folder
    )
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", NUMBERS)
def test_a_recipe_passes_check(
    small_llama: Path, pairs_file: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["--model.name_or_path", str(small_llama), "--data.train", str(pairs_file), "--data.test", "null"]
    keys += ["--run_dir", str(tmp_path / "run"), "--data.cache_dir", str(tmp_path / "tokenized")]
    status = run(["check", "--config", str(RECIPES[name]), *keys])
    assert status == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", NUMBERS)
def test_a_recipe_can_be_planned(plan: Planned, described: Callable[..., Path], name: str) -> None:
    config, size = MODELS[name]
    keys = ("--config", str(RECIPES[name]), "--data.test", "null")
    found = plan(described(name, **config), *keys, gpus=64 if "70b" in name else 8)
    assert found["model"]["parameters"] == pytest.approx(size, rel=0.005)
    assert found["advice"]["sharding"] is not None
    assert found["steps"] == -(-37 // NUMBERS[name][3])
