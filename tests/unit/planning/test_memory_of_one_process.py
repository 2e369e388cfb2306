"""The memory that `dpo plan` estimates for one process is what a training step allocates."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from products import ProductsAreZero
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.rank_memory import Planned, measure, some_trees
from dpo.config import LoraConfig, ModelConfig

LORA: dict[str, Any] = {"lora": LoraConfig(rank=8)}
CASES: dict[str, dict[str, Any]] = {
    "4 bits": {"quantization": "nf4", **LORA},
    "4 bits, bfloat16": {"quantization": "nf4", "dtype": "bfloat16", **LORA},
    "4 bits, selective": {"quantization": "nf4", "gradient_checkpointing": "selective", **LORA},
    "8 bits": {"quantization": "int8", **LORA},
    "8 bits, bfloat16": {"quantization": "int8", "dtype": "bfloat16", **LORA},
    "8 bits, full": {"quantization": "int8", "gradient_checkpointing": "full", **LORA},
    "selective": {"gradient_checkpointing": "selective"},
    "offloaded": {"offload_activations": True},
    "offloaded, full": {"offload_activations": True, "gradient_checkpointing": "full"},
    "full": {"gradient_checkpointing": "full"},
}


@pytest.fixture(autouse=True)
def any_precision() -> Iterator[None]:
    """Lets each case choose the compute type of its process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(
        num_hidden_layers=4, hidden_size=384, intermediate_size=1024, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=8000, max_position_embeddings=128,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_step_allocates_what_was_planned(llama: Path, case: str) -> None:
    model = ModelConfig(name_or_path=str(llama), **{"dtype": "float32", **CASES[case]})
    expected = Planned.of(model, some_trees(3)).memory("no DeepSpeed", 1)
    with ProductsAreZero():
        found = measure(model, some_trees(3))
    assert expected["total"] == pytest.approx(found["peak"], rel=0.03)
