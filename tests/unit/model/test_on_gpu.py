"""What only a GPU can show: kernels that CPUs do not have. `python -m benchmarks.gpu.right` runs these."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from families import naive_logps, random_tree, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo.data.trees import Layout, tree_batch
from dpo.engine.dither import dither
from dpo.loss.pairs import pair_logps
from dpo.model.first_blocks import in_float32
from dpo.model.probe import Comparison, probe
from dpo.model.probe_trees import trees_of
from dpo.model.projection import TokenLogProbs, kernels_on
from dpo.model.scorer import SequenceScorer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.filterwarnings("ignore"),  # compilers of several kinds
]
CARD = torch.device("cuda")
TREES = [random_tree(np.random.default_rng(0), 3, 200), random_tree(np.random.default_rng(1), 2, 200)]


def wide(family: str) -> PreTrainedModel:
    """With heads of 16, the least of FlexAttention's kernels, and positions for the trees above."""
    positions = {"max_position_embeddings": 512, "n_positions": 512}
    return tiny(family, hidden_size=64, head_dim=16, n_embd=64, **positions)


def gradient(model: PreTrainedModel) -> Tensor:
    return torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("layout", ["flex", "packed", "trees"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma3_text"])
def test_log_probs_and_gradients_are_those_of_rows_on_the_cpu(family: str, layout: Layout) -> None:
    plain, scorer = wide(family), SequenceScorer(wide(family).to(CARD), flex=True)
    expected = naive_logps(plain, TREES)
    weight = torch.randn(len(expected))
    found = scorer(tree_batch(TREES, layout).to(CARD, scorer.windows), per_token=True)
    torch.testing.assert_close(found.cpu(), expected.detach(), rtol=1e-3, atol=1e-3)
    (expected * weight).sum().backward()
    (found * weight.to(CARD)).sum().backward()
    assert F.cosine_similarity(gradient(scorer.model), gradient(plain), dim=0) > 0.9999


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_flex_is_chosen_in_bfloat16(family: str) -> None:
    scorer = SequenceScorer(wide(family).bfloat16().to(CARD), flex=True)
    trees = trees_of(TREES[0])
    compared = [
        Comparison(in_float32(scorer), trees.long, device=CARD, windows=scorer.windows),
        Comparison(scorer, trees.short, device=CARD, windows=scorer.windows, exact=False),
    ]
    probed = probe(scorer.layouts, compared)
    assert (probed.layout, probed.notes) == ("flex", ())


def test_products_of_slices_are_summed_in_float32() -> None:
    head = nn.Linear(64, 16 * 1024, bias=False, dtype=torch.bfloat16, device=CARD)
    hidden = torch.randn(32, 64, dtype=torch.bfloat16, device=CARD, requires_grad=True)
    layer, targets = TokenLogProbs(head, tiny("llama").config), torch.arange(32, device=CARD)
    found = []
    for num_slices in (1, 16):
        layer.slice_elements = 32 * head.out_features // num_slices
        found.append(torch.autograd.grad(layer(hidden, targets).sum(), hidden)[0].float())
    torch.testing.assert_close(found[0], found[1], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_projections_kernels_equal_the_sliced_path(dtype: torch.dtype) -> None:
    head = nn.Linear(64, 16 * 1024 + 3, bias=False, dtype=dtype, device=CARD)
    hidden = torch.randn(100, 64, dtype=dtype, device=CARD, requires_grad=True)
    targets = torch.randint(16 * 1024 + 3, (100,), device=CARD)
    layer, found = TokenLogProbs(head, tiny("llama").config), []
    layer.slice_elements = 100 * 4096
    assert kernels_on(hidden.device) is not None
    for kernels in (None, False):
        layer.kernels = kernels  # type: ignore[assignment]
        logps = layer(hidden, targets)
        found.append([logps.detach(), *torch.autograd.grad(logps.sum(), [hidden, head.weight])])
    for ours, plain in zip(*found, strict=True):
        within = 2**-7 if ours.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(ours, plain, rtol=within, atol=within)


def test_length_weights_have_deterministic_kernels() -> None:
    logps = torch.randn(6, device=CARD, requires_grad=True)
    tokens, pairs = torch.tensor([1, 3, 2], device=CARD), torch.tensor([[1, 0], [0, 2]], device=CARD)
    torch.use_deterministic_algorithms(True)
    try:
        pair_logps(logps, pairs, tokens, 0.5).chosen.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_pass_does_not_wait_for_the_device() -> None:
    scorer = SequenceScorer(wide("llama").to(CARD), flex=True)
    batch = tree_batch(TREES, "flex").to(CARD, scorer.windows)
    scorer(batch).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        scorer(batch).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_masters_are_dithered_to_the_bits_of_a_cpu() -> None:
    values = torch.randn(2**23 + 5).bfloat16().float()  # more than are computed at once
    on_card = values.to(CARD)
    for masters in (values, on_card):
        dither(masters, key=-7, start=3)
    assert torch.equal(on_card.cpu(), values)
