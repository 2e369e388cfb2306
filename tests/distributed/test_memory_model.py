"""The memory that `dpo plan` estimates is what real ranks allocate, measured from their tensors' storages."""

import json
from pathlib import Path
from typing import Literal

import pytest
from ranks import output_of, start_ranks, wait
from rig import deepspeed_variables
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.rank_memory import predict, predict_traffic, some_trees
from dpo.config import LoraConfig, ModelConfig
from dpo.planning.memory import Name

TREES = 3
MEASURE = """
import os, sys
from benchmarks.rank_memory import main
main({arguments!r})
sys.stdout.flush()
os._exit(0)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A tied GPT-2 with 5M parameters, and an untied Llama with grouped-query attention and 12M."""
    folder = tmp_path_factory.mktemp("models")
    gpt2 = GPT2Config(n_layer=4, n_embd=320, n_head=5, vocab_size=2000, n_positions=128)
    llama = LlamaConfig(
        num_hidden_layers=4, hidden_size=384, intermediate_size=1024, num_attention_heads=6,
        num_key_value_heads=2, vocab_size=8000, max_position_embeddings=128,
    )  # fmt: skip
    GPT2LMHeadModel(gpt2).save_pretrained(folder / "gpt2")
    LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    return [folder / "gpt2", folder / "llama"]


Dtype = Literal["float32", "bfloat16"]
CASES: list[tuple[int, int, Dtype, int | None]]
CASES = [(ranks, stage, "float32", None) for ranks in (1, 2, 4) for stage in (0, 2, 3)]
CASES += [(2, stage, "bfloat16", lora_rank) for stage in (2, 3) for lora_rank in (None, 8)]


@pytest.mark.parametrize(("ranks", "stage", "dtype", "lora_rank"), CASES)
def test_ranks_allocate_and_send_what_was_planned(
    models: list[Path], tmp_path: Path, ranks: int, stage: int, dtype: Dtype, lora_rank: int | None
) -> None:
    output = tmp_path / "measured.json"
    arguments = ["--models", *map(str, models), "--dtype", dtype, "--trees", str(TREES)]
    arguments += ["--lora_rank", str(lora_rank)] if lora_rank else []
    code = MEASURE.format(arguments=[*arguments, "--output", str(output)])
    variables = deepspeed_variables(tmp_path, stage)
    statuses = wait(start_ranks(ranks, [], tmp_path / "logs", variables=variables, before=code))
    assert statuses == [0] * ranks, output_of(tmp_path / "logs")[-3000:]
    names: dict[int, Name] = {0: "ZeRO-0", 2: "ZeRO-2", 3: "ZeRO-3"}
    for model, measured in json.loads(output.read_text()).items():
        lora = LoraConfig(rank=lora_rank) if lora_rank else None
        config = ModelConfig(name_or_path=model, dtype=dtype, lora=lora)
        expected = predict(config, some_trees(TREES), names[stage], ranks)
        assert expected["total"] == pytest.approx(measured["peak"], rel=0.1), (measured, expected)
        if ranks > 1:
            messages = predict_traffic(config, names[stage], ranks)
            others = sum(size for kind, size in measured["sent"].items() if kind not in messages)
            assert others < 0.01 * sum(messages.values())
            assert {kind: measured["sent"][kind] for kind in messages} == pytest.approx(messages, rel=0.02)
