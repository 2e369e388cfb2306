"""What the backward pass computes again: all of a block, or all but what its attention has computed."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dpo.model.recomputation import recompute, recomputed_share

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 300,
}
IDS = torch.arange(40)[None]


class Counted(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func.name()] += 1
        return func(*args, **(kwargs or {}))


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=128, num_key_value_heads=2))
    return GPT2LMHeadModel(GPT2Config(**SIZES, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def step(family: str, kind: Any) -> tuple[Counter[str], list[torch.Tensor]]:
    """Operations of a forward and backward pass, and the gradients."""
    model = model_of(family)
    recompute(model, kind)
    model.train()
    with Counted() as counted:
        model(IDS).logits.log_softmax(-1).square().mean().backward()
    return counted.found, [weight.grad for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_attention_is_computed_once_and_the_feed_forward_layers_twice(family: str) -> None:
    plain, full, selective = (step(family, kind) for kind in (False, "full", "selective"))
    kernel = next(name for name in plain[0] if "scaled_dot_product" in name and "backward" not in name)
    assert [found[0][kernel] for found in (plain, full, selective)] == [2, 4, 2]
    products = [found[0]["aten::mm"] + found[0]["aten::addmm"] for found in (plain, full, selective)]
    of_attention, of_feed_forward = {"llama": (4, 3), "gpt2": (2, 2)}[family]
    # The last product of a block is not computed again: nothing of the backward pass needs it.
    assert products[1] - products[0] == 2 * (of_attention + of_feed_forward - 1)
    assert products[2] - products[0] == 2 * (of_feed_forward - 1)
    for found in (full, selective):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[1], plain[1], strict=True))


def test_true_is_full() -> None:
    assert step("llama", True)[0] == step("llama", "full")[0]


def test_the_share_that_runs_twice_is_that_of_the_weights_outside_of_attention() -> None:
    model = model_of("llama")
    attention, feed_forward, norms = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 128, 2 * 64
    expected = (feed_forward + norms) / (attention + feed_forward + norms)
    assert recomputed_share(model, "selective") == pytest.approx(expected)
    kinds: list[Any] = [False, True, "full"]
    assert [recomputed_share(model, kind) for kind in kinds] == [0, 1, 1]


def test_passes_without_gradients_keep_nothing() -> None:
    model = model_of("llama")
    recompute(model, "selective")
    model.train()
    with torch.no_grad(), Counted() as counted:
        first, second = model(IDS).logits, model(IDS).logits
    assert torch.equal(first, second)
    assert sum("scaled_dot_product" in name for name in counted.found.elements()) == 4
