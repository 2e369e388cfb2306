"""Law 3: log-probs and gradients of a tree are those of separate rows through the model's own logits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from families import ROWS, TREES, WINDOW, random_ids, random_tree, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from dpo.data.trees import Layout, Tree, tree_batch
from dpo.model.probe import Probed, probe
from dpo.model.scorer import SequenceScorer

SHARED: tuple[Layout, ...] = ("packed", "trees")


def naive(model: PreTrainedModel, trees: list[Tree]) -> Tensor:
    """(N,) log-probs: one sequence at a time, nothing shared, softmax over the model's own logits."""
    found = []
    for prompt, completions in trees:
        for completion in completions:
            ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            found.append(-F.cross_entropy(logits, ids[0, len(prompt) :], reduction="none"))
    return torch.cat(found)


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
    expected = naive(plain, trees)
    # Every token counts by its own weight, so that an error in one cannot hide in a sum.
    weight = torch.from_numpy(np.random.default_rng(weights).normal(size=len(expected)).astype(np.float32))
    wanted = gradient(plain, (expected * weight).sum())
    assert layouts_of(scorer)
    for layout in layouts_of(scorer):
        found = scorer(tree_batch(trees, layout), per_token=True)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=2e-5)
        assert F.cosine_similarity(gradient(scorer.model, (found * weight).sum()), wanted, dim=0) > 0.99999


@pytest.mark.parametrize("family", TREES)
def test_the_probe_lets_it_share_prompts(family: str) -> None:
    probed = probed_layout(family)
    packs = family not in ("falcon", "gemma2")  # own attention code; soft-capped scores
    assert probed == Probed(layout="packed" if packs else "trees", uses_projection=True, notes=())


@pytest.mark.parametrize("family", ROWS)
def test_the_probe_falls_back_to_rows_and_says_so(family: str) -> None:
    probed = probed_layout(family)
    assert (probed.layout, probed.uses_projection) == ("rows", True)
    assert probed.notes == ("this model cannot share a prompt between completions: one row a completion",)
    rng = np.random.default_rng(0)
    trees, scorer = [random_tree(rng, 3), random_tree(rng, 2)], SequenceScorer(tiny(family))
    with torch.no_grad():
        found = scorer(tree_batch(trees, "rows"), per_token=True)
        torch.testing.assert_close(found, naive(tiny(family), trees), rtol=1e-5, atol=5e-5)


def probed_layout(family: str) -> Probed:
    scorer = SequenceScorer(tiny(family))
    longest = random_tree(np.random.default_rng(0), 3)
    device = torch.device("cpu")
    return probe(scorer, scorer.layouts, longest, dtype=torch.float32, device=device)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's, as it loads its compiler
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma3_text"])  # each compiles for seconds
def test_flex_attention_gives_the_same_on_a_cpu_without_gradients(family: str) -> None:
    rng = np.random.default_rng(0)
    trees = [random_tree(rng, 3), random_tree(rng, 2)]
    scorer = SequenceScorer(tiny(family), flex=True)
    assert scorer.layout == "flex"
    with torch.no_grad():
        found = scorer(tree_batch(trees, "flex"), per_token=True)
        torch.testing.assert_close(found, naive(tiny(family), trees), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text"])
def test_a_window_that_is_not_folded_in_would_show(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
        assert (found - naive(tiny(family), [(prompt, completions)])).abs().max() > 0.01


def test_a_model_that_looks_the_same_but_is_not_falls_back() -> None:
    class Forgetful(SequenceScorer):
        """Sees the other completions of its tree in every layout but rows."""

        def forward(self, batch, **options):  # type: ignore[no-untyped-def]
            found = super().forward(batch, **options)
            return found + 0.01 * (batch.layout != "rows")

    scorer = Forgetful(tiny("llama"))
    longest = random_tree(np.random.default_rng(0), 3)
    cpu = torch.device("cpu")
    probed = probe(scorer, scorer.layouts, longest, dtype=torch.float32, device=cpu)
    assert probed.layout == "rows"
    assert [note.split(":")[0] for note in probed.notes] == [
        "layout packed is not used",
        "layout trees is not used",
    ]
    assert "differ by 0.01 nats a token from rows" in probed.notes[0]


def test_a_projection_that_is_not_ours_is_left_to_the_model() -> None:
    model = tiny("llama")
    head = model.lm_head
    model.lm_head = Halved(head)  # what we do not know about: it halves its logits
    scorer = SequenceScorer(model)
    longest = random_tree(np.random.default_rng(0), 3)
    cpu = torch.device("cpu")
    probed = probe(scorer, scorer.layouts, longest, dtype=torch.float32, device=cpu)
    assert (probed.layout, probed.uses_projection) == ("packed", False)
    assert probed.notes[0].startswith("the model's own output projection is used: ours differs by")
    scorer.uses_projection = False
    with torch.no_grad():
        found = scorer(tree_batch([longest], "packed"), per_token=True)
        torch.testing.assert_close(found, naive(model, [longest]), rtol=1e-5, atol=2e-5)


class Halved(torch.nn.Module):
    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias

    def forward(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight) / 2
