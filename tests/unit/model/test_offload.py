"""Activations in the host's memory: the same gradients to the bit, and what is moved."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dpo.model.offload import LEAST_BYTES, Offload, offload
from dpo.model.recomputation import recompute

SIZES: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
IDS = torch.arange(290)[None]
OF_A_BLOCK = 290 * 64 * 4
"""Bytes of the input of a block."""


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=128, num_key_value_heads=2))
    return GPT2LMHeadModel(GPT2Config(**SIZES, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def step(family: str, kind: Any, *, moved: bool) -> tuple[Offload, list[torch.Tensor]]:
    model = model_of(family)
    recompute(model, kind)
    offloading = Offload(model)
    if moved:
        offload(model, offloading)
    model.train()
    model(IDS).logits.log_softmax(-1).square().mean().backward()
    return offloading, [weight.grad for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("kind", [False, "full", "selective"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradients_are_the_same_to_the_bit(family: str, kind: Any) -> None:
    moved, plain = step(family, kind, moved=True), step(family, kind, moved=False)
    assert len(moved[1]) == len(plain[1]) > 10
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(moved[1], plain[1], strict=True))
    assert plain[0].bytes == 0 < moved[0].bytes


def test_with_recomputed_blocks_their_inputs_are_moved_and_else_far_more() -> None:
    assert OF_A_BLOCK > LEAST_BYTES
    full, whole = (step("llama", kind, moved=True)[0].bytes for kind in ("full", False))
    assert 2 * OF_A_BLOCK <= full <= 5 * OF_A_BLOCK  # and what the last norm keeps
    assert whole > 4 * full


def test_weights_small_tensors_and_passes_without_gradient_stay() -> None:
    model = model_of("llama")
    offloading = Offload(model)
    offload(model, offloading)
    with torch.no_grad():
        model(IDS)
    assert offloading.bytes == 0
    model(IDS[:, :2])
    assert offloading.bytes == 0  # not even the weights that products keep
