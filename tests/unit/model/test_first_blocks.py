"""The copy is the model's own code and weights, in float32 and cut after the first blocks."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from families import ROWS, TREES, naive_logps, random_tree, tiny
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig

from dpo.data.trees import tree_batch
from dpo.model.first_blocks import first_blocks, num_blocks
from dpo.model.scorer import SequenceScorer

TREE = random_tree(np.random.default_rng(0), 3)


@pytest.mark.parametrize("family", TREES | ROWS)
def test_a_model_of_two_blocks_is_its_own_copy(family: str) -> None:
    model = tiny(family)
    score = first_blocks(SequenceScorer(model))
    found = score(tree_batch([TREE], "rows"), per_token=True)
    with torch.no_grad():
        torch.testing.assert_close(found, naive_logps(model, [TREE]), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_weights_in_bfloat16_are_widened_and_not_changed(family: str) -> None:
    scorer = SequenceScorer(tiny(family).bfloat16())
    before = {name: weight.clone() for name, weight in scorer.state_dict().items()}
    found = first_blocks(scorer)(tree_batch([TREE], "rows"), per_token=True)
    with torch.no_grad():
        wanted = naive_logps(tiny(family).bfloat16().float(), [TREE])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=5e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in scorer.state_dict().items())


def test_adapters_are_left_out() -> None:
    model = tiny("llama")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], r=2), model)
    with torch.no_grad():
        wanted = naive_logps(tiny("llama"), [TREE])
    found = first_blocks(SequenceScorer(model))(tree_batch([TREE], "rows"), per_token=True)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=5e-5)


def test_sharded_weights_are_whole_while_they_are_copied_and_only_those_of_the_copy() -> None:
    seen: list[int] = []

    @contextmanager
    def gathered(parameters: list[nn.Parameter]):  # type: ignore[no-untyped-def]
        seen.append(len({*parameters}))
        yield

    model = tiny("llama")
    model.model.layers.extend(tiny("llama").model.layers)  # four blocks
    model.config.num_hidden_layers = 4
    first_blocks(SequenceScorer(model), gathered)
    assert seen == [len({*tiny("llama").parameters()})]


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (None, 2),
        (["full_attention"] * 6, 2),
        (["sliding_attention"] * 5 + ["full_attention"], 6),
        (["sliding_attention", "full_attention"] * 3, 2),
    ],
)
def test_every_type_of_layer_is_in_the_copy(types: list[str] | None, expected: int) -> None:
    if types is None:
        assert num_blocks(AutoConfig.for_model("llama", num_hidden_layers=6)) == expected
    else:
        config = AutoConfig.for_model("gemma3_text", num_hidden_layers=6, layer_types=types)
        assert num_blocks(config) == expected
    assert num_blocks(AutoConfig.for_model("llama", num_hidden_layers=1)) == 1
