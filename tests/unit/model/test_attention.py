"""Law 3: log-probs and gradients of a tree are those of separate rows through the model's own logits.

Every family of `families.TREES` is tried in every layout that its model offers. FlexAttention is compiled for
the CPU and has no backward pass there.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from families import TREES, WINDOW, naive_logps, random_ids, random_tree, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from dpo.data.trees import Layout, tree_batch
from dpo.model.scorer import SequenceScorer

SHARED: tuple[Layout, ...] = ("packed", "trees")


def gradient(model: PreTrainedModel, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def layouts_of(scorer: SequenceScorer) -> list[Layout]:
    return [layout for layout in scorer.layouts if layout in SHARED]


@pytest.mark.parametrize("family", TREES)
@given(seed=st.integers(0, 10**6), num_completions=st.integers(2, 8), weights=st.integers(0, 10**6))
@settings(max_examples=4, deadline=None)
def test_a_tree_has_the_log_probs_and_gradients_of_rows(
    family: str, seed: int, num_completions: int, weights: int
) -> None:
    rng = np.random.default_rng(seed)
    trees = [random_tree(rng, num_completions), random_tree(rng, 2)]
    plain, scorer = tiny(family), SequenceScorer(tiny(family))
    expected = naive_logps(plain, trees)
    # Every token has its own weight, so that errors cannot cancel in a sum.
    weight = torch.from_numpy(np.random.default_rng(weights).normal(size=len(expected)).astype(np.float32))
    wanted = gradient(plain, (expected * weight).sum())
    assert layouts_of(scorer)
    for layout in layouts_of(scorer):
        found = scorer(tree_batch(trees, layout), per_token=True)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=2e-5)
        assert F.cosine_similarity(gradient(scorer.model, (found * weight).sum()), wanted, dim=0) > 0.99999


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's, as it loads its compiler
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma3_text"])  # each compiles for seconds
def test_flex_attention_gives_the_same_on_a_cpu_without_gradients(family: str) -> None:
    rng = np.random.default_rng(0)
    trees = [random_tree(rng, 3), random_tree(rng, 2)]
    scorer = SequenceScorer(tiny(family), flex=True)
    assert scorer.layout == "flex"
    with torch.no_grad():
        found = scorer(tree_batch(trees, "flex"), per_token=True)
        torch.testing.assert_close(found, naive_logps(tiny(family), trees), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_missing_window_would_be_noticed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The sequences are long enough for the test above to fail without the window.
    prompt, completions = random_ids(np.random.default_rng(0), 3 * WINDOW), [np.array([5, 6], dtype=np.int32)]
    model = tiny(family)
    scorer = SequenceScorer(model)
    monkeypatch.setattr(model.config, "sliding_window", None)
    for module in model.modules():
        if hasattr(module, "sliding_window"):
            monkeypatch.setattr(module, "sliding_window", None)
    with torch.no_grad():
        found = scorer(tree_batch([(prompt, completions)], "packed"), per_token=True)
        assert (found - naive_logps(tiny(family), [(prompt, completions)])).abs().max() > 0.01
