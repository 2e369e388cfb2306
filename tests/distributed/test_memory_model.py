"""The memory that `dpo plan` estimates is what real ranks allocate, measured from their tensors' storages."""

import json
from functools import cache
from pathlib import Path
from typing import Any, Literal

import pytest
from ranks import output_of, start_ranks, wait
from rig import deepspeed_variables
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks.rank_memory import Planned, some_trees
from dpo.config import LoraConfig, ModelConfig
from dpo.planning.memory import Name

TREES = 3
MEASURE = """
import os, sys
from benchmarks.rank_memory import main
from products import ProductsAreZero
for variables, arguments in {cases!r}:
    os.environ.update(variables)
    with ProductsAreZero():
        main(arguments)
sys.stdout.flush()
os._exit(0)
"""
"""Measures every case of one number of ranks; rank_memory resets what Accelerate keeps between models."""


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
Case = tuple[int, int, Dtype, int | None, str]
"""Number of ranks, ZeRO stage, compute type, the rank of an adapter or None, and one of OPTIONS."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "selective": {"gradient_checkpointing": "selective"},
    "full": {"gradient_checkpointing": "full"},
}
CASES: list[Case]
CASES = [(ranks, stage, "float32", None, "plain") for ranks in (1, 2, 4) for stage in (0, 2, 3)]
CASES += [(2, stage, "bfloat16", lora_rank, "plain") for stage in (2, 3) for lora_rank in (None, 8)]
CASES += [(2, stage, "float32", None, option) for stage in (2, 3) for option in ("selective", "full")]


Measured = dict[str, dict[str, Any]]
"""Folder of a model -> what `rank_memory.measure` counted."""


@pytest.fixture(scope="module")
def measured(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Measured]:
    """What real ranks allocated and sent, case by case: one start for each number of ranks."""
    folder = tmp_path_factory.mktemp("measured")
    for ranks in {case[0] for case in CASES}:
        cases = []
        for number, (_, stage, dtype, lora_rank, option) in own_cases(ranks):
            arguments = ["--models", *map(str, models), "--dtype", dtype, "--trees", str(TREES)]
            arguments += ["--lora_rank", str(lora_rank)] if lora_rank else []
            arguments += [word for name, value in OPTIONS[option].items() for word in (f"--{name}", value)]
            output = folder / f"{number}.json"
            cases.append((deepspeed_variables(folder, stage), [*arguments, "--output", str(output)]))
        code, logs = MEASURE.format(cases=cases), folder / f"logs{ranks}"
        statuses = wait(start_ranks(ranks, [], logs, variables=cases[0][0], before=code), 300)
        assert statuses == [0] * ranks, output_of(logs)[-3000:]
    return {case: json.loads((folder / f"{number}.json").read_text()) for number, case in enumerate(CASES)}


def own_cases(ranks: int) -> list[tuple[int, Case]]:
    """The cases of this number of ranks, with their numbers; those that shard weights come last."""
    mine = [(number, case) for number, case in enumerate(CASES) if case[0] == ranks]
    return sorted(mine, key=lambda entry: entry[1][1])


@cache
def planned(model: str, dtype: Dtype, lora_rank: int | None, option: str) -> Planned:
    lora = LoraConfig(rank=lora_rank) if lora_rank else None
    config = ModelConfig(name_or_path=model, dtype=dtype, lora=lora, **OPTIONS[option])
    return Planned.of(config, some_trees(TREES))


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_ranks_allocate_and_send_what_was_planned(measured: dict[Case, Measured], case: Case) -> None:
    ranks, stage, dtype, lora_rank, option = case
    names: dict[int, Name] = {0: "ZeRO-0", 2: "ZeRO-2", 3: "ZeRO-3"}
    for model, found in measured[case].items():
        plan = planned(model, dtype, lora_rank, option)
        expected = plan.memory(names[stage], ranks)
        assert expected["total"] == pytest.approx(found["peak"], rel=0.1), (found, expected)
        if ranks > 1:
            messages = plan.messages(names[stage], ranks)
            others = sum(size for kind, size in found["sent"].items() if kind not in messages)
            assert others < 0.01 * sum(messages.values())
            assert {kind: found["sent"][kind] for kind in messages} == pytest.approx(messages, rel=0.02)
