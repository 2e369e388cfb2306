"""The copy is the model's own code, weights and mode, in float32, whole or cut after the first blocks."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from families import ROWS, TREES, naive_logps, random_tree, tiny
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import AutoConfig

from dpo.data.trees import tree_batch
from dpo.model.first_blocks import enough_blocks, in_float32
from dpo.model.scorer import SequenceScorer

TREE = random_tree(np.random.default_rng(0), 3)


@pytest.mark.parametrize("family", TREES | ROWS)
def test_a_model_of_two_blocks_is_its_own_copy(family: str) -> None:
    model = tiny(family)
    score = in_float32(SequenceScorer(model), num_blocks=2)
    found = score(tree_batch([TREE], "rows"), per_token=True)
    with torch.no_grad():
        torch.testing.assert_close(found, naive_logps(model, [TREE]), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
def test_weights_in_bfloat16_are_widened_and_not_changed(family: str) -> None:
    scorer = SequenceScorer(tiny(family).bfloat16())
    before = {name: weight.clone() for name, weight in scorer.state_dict().items()}
    found = in_float32(scorer, num_blocks=2)(tree_batch([TREE], "rows"), per_token=True)
    with torch.no_grad():
        wanted = naive_logps(tiny(family).bfloat16().float(), [TREE])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=5e-5)
    assert all(torch.equal(weight, before[name]) for name, weight in scorer.state_dict().items())


def test_a_copy_of_the_whole_model_is_the_model_in_its_mode() -> None:
    model = tiny("llama", num_hidden_layers=3)
    model.model.layers[1].training = True  # as gradient checkpointing does
    seen: list[bool] = []
    kind = type(model.model.layers[0])
    original = kind.forward

    def forward(self, *rest, **options):  # type: ignore[no-untyped-def]
        seen.append(self.training)
        return original(self, *rest, **options)

    score = in_float32(SequenceScorer(model))
    kind.forward = forward
    try:
        found = score(tree_batch([TREE], "rows"), per_token=True)
    finally:
        kind.forward = original
    assert seen == [False, True, False]
    with torch.no_grad():
        torch.testing.assert_close(found, naive_logps(model, [TREE]), rtol=1e-5, atol=5e-5)


def test_adapters_are_left_out() -> None:
    model = tiny("llama")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], r=2), model)
    with torch.no_grad():
        wanted = naive_logps(tiny("llama"), [TREE])
    found = in_float32(SequenceScorer(model), num_blocks=2)(tree_batch([TREE], "rows"), per_token=True)
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
    in_float32(SequenceScorer(model), gathered, num_blocks=2)
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
        assert enough_blocks(AutoConfig.for_model("llama", num_hidden_layers=6)) == expected
    else:
        config = AutoConfig.for_model("gemma3_text", num_hidden_layers=6, layer_types=types)
        assert enough_blocks(config) == expected
    assert enough_blocks(AutoConfig.for_model("llama", num_hidden_layers=1)) == 1
