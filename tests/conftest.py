"""Fixtures that most tests share: a tiny GPT-2 with its tokenizer, preference files, and tokenized data.

Nothing here uses the network. The model is saved once per session, and tests that need it load it from disk.
"""

import gc
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import END, POSITIONS, make_tiny_model
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo.config import Config, DataConfig, ModelConfig, ReferenceConfig, TrainConfig
from dpo.data.build import open_datasets
from dpo.data.dataset import TokenizedDataset
from dpo.model.tokenizer import load_tokenizer

WORDS = ("the", "cat", "day", "good", "bad", "film", "well", "mat", "we", "like", "ended", "on")

Row = Mapping[str, Any]

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers already share the cores
    torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker of tests that need a card, and how the threads of child processes wait.

    By default a thread of OpenMP that waits for the others spins, and takes a core from ranks that compute:
    where ranks outnumber cores, a training on one rank with two threads takes several times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    config.addinivalue_line("markers", "gpu: needs a GPU; python -m benchmarks.gpu.right runs these")


def pytest_collection_finish() -> None:
    """Leaves what was imported out of garbage collections, which take a tenth of the time otherwise."""
    gc.freeze()


def pytest_unconfigure() -> None:
    """So that extensions do not report what is collected at the end as leaked."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a GPT-2 of two layers (dropout 0.1 in its config) and a byte-level BPE tokenizer.

    The weights are large, so that its distributions are far from uniform and depend on every token.
    """
    return make_tiny_model(tmp_path_factory.mktemp("tiny_model"))


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    """A fresh copy of the tiny model's tokenizer, which a test may modify. It adds no BOS."""
    loaded = load_tokenizer(ModelConfig(name_or_path=str(tiny_model)))
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture
def bos_tokenizer(tiny_model: Path) -> PreTrainedTokenizerFast:
    """The same tokenizer with a BOS `<s>` that it adds before every text, as Llama's does."""
    loaded = AutoTokenizer.from_pretrained(tiny_model)
    backend = json.loads(loaded.backend_tokenizer.to_str())
    number = len(loaded)
    backend["added_tokens"].append({**backend["added_tokens"][0], "id": number, "content": "<s>"})
    backend["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [number], "tokens": ["<s>"]}},
    }
    made = Tokenizer.from_str(json.dumps(backend))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token=END, pad_token=END)


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    """Writes rows as JSON Lines and returns the path: write_jsonl(rows, name="data.jsonl")."""

    def write(rows: Iterable[Row], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture(scope="session")
def preference_rows() -> Callable[..., list[dict[str, Any]]]:
    """Makes rows of random words, determined by the seed: groups of 2 to 4 completions with 1 to 3 pairs."""

    def make(num_rows: int, seed: int = 0) -> list[dict[str, Any]]:
        rng = np.random.default_rng(seed)

        def text(longest: int) -> str:
            return " ".join(rng.choice(WORDS, int(rng.integers(1, longest + 1))))

        rows = []
        for number in range(num_rows):
            others = int(rng.integers(1, 4))
            rows.append(
                {
                    "prompt": f"{number} {text(6)}",
                    "completions": [f" {text(8)} {index}" for index in range(others + 1)],
                    "pairs": [{"chosen": 0, "rejected": index + 1} for index in range(others)],
                }
            )
        return rows

    return make


@pytest.fixture
def make_config(tiny_model: Path, tmp_path: Path) -> Callable[..., Config]:
    """The smallest experiment on the tiny model in float32: make_config(data_path, learning_rate=1e-3)."""

    def make(train: str, *, test: str | None = None, **options: Any) -> Config:
        return Config(
            run_dir=str(tmp_path / "run"),
            model=ModelConfig(name_or_path=str(tiny_model), dtype="float32"),
            data=DataConfig(train=train, test=test, cache_dir=str(tmp_path / "tokenized")),
            reference=ReferenceConfig(cache_dir=str(tmp_path / "reference")),
            train=TrainConfig(**options),
        )

    return make


@pytest.fixture
def open_data(tokenizer: PreTrainedTokenizerFast) -> Callable[[Config], TokenizedDataset]:
    """Opens the tokenized training data of a configuration."""
    return lambda config: open_datasets(config.data, tokenizer, POSITIONS)[0]


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 plain pairs of varying length as JSON Lines; no multiple of a batch size or number of ranks."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(37):
        prompt, chosen, rejected = (" ".join(rng.choice(WORDS, int(rng.integers(1, 8)))) for _ in range(3))
        rows.append({"prompt": prompt, "chosen": f" {chosen} good", "rejected": f" {rejected} bad"})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
