"""Law 3: log-probs and gradients of a tree are those of separate rows through the model's own logits.

Every family of `families.TREES` is tried in every layout that its model offers. FlexAttention's kernel for
CPUs has no backward pass: there its forward and backward pass are traced as on a GPU and run by the backend
`aot_eager`, without fused kernels.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from families import TREES, WINDOW, naive_logps, random_ids, random_tree, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention import flex_attention
from transformers import PreTrainedModel

from dpo.data.trees import Layout, tree_batch
from dpo.model import attention
from dpo.model.attention import windows_of
from dpo.model.scorer import SequenceScorer

DYNAMOS_OWN_LIMIT = 8
SHARED: tuple[Layout, ...] = ("packed", "trees")


def gradient(model: PreTrainedModel, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return found


def layouts_of(scorer: SequenceScorer) -> list[Layout]:
    found = [layout for layout in scorer.layouts if layout in SHARED]
    return ["varlen", *found] if "packed" in found else found  # on GPUs alone models offer it by themselves


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


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma3_text"])  # each compiles for seconds
# With shapes that vary, torch 2.13 writes C++ for CPUs that does not compile (cur_qSplitSize8).
@torch._dynamo.config.patch(automatic_dynamic_shapes=False)
def test_flex_attention_gives_the_same_on_a_cpu_without_gradients(family: str) -> None:
    torch._dynamo.reset()
    rng = np.random.default_rng(0)
    trees = [random_tree(rng, 3), random_tree(rng, 2)]
    scorer = SequenceScorer(tiny(family), flex=True)
    assert scorer.layout == "flex"
    with torch.no_grad():
        found = scorer(tree_batch(trees, "flex"), per_token=True)
        torch.testing.assert_close(found, naive_logps(tiny(family), trees), rtol=1e-5, atol=5e-5)


@pytest.fixture
def flex_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention with gradients on a CPU."""
    torch._dynamo.reset()
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(attention, "compiled_flex", compiled())


def compiled() -> object:
    return torch.compile(flex_attention.flex_attention, fullgraph=True, backend="aot_eager")


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own
@pytest.mark.usefixtures("flex_backward")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral", "gemma3_text"])  # the last two have windows
def test_flex_attention_has_the_gradients_of_rows(
    family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, scorer = tiny(family), SequenceScorer(tiny(family), flex=True)
    if checkpointing:
        scorer.model.activation_checkpointing_enable({"use_reentrant": False})
        scorer.model.train()
    work = []
    for seed in (0, 1, 2):  # rows of three widths, one compiled function
        rng = np.random.default_rng(seed)
        trees = [random_tree(rng, 4, longest=40 + 30 * seed), random_tree(rng, 2)]
        work.append((rng, trees, tree_batch(trees, "flex").to(torch.device("cpu"), scorer.windows)))
    monkeypatch.setattr("dpo.data.trees.key_blocks", None)  # blocks of all windows are there beforehand
    for rng, trees, batch in work:
        expected = naive_logps(plain, trees)
        weight = torch.from_numpy(rng.normal(size=len(expected)).astype(np.float32))
        wanted = gradient(plain, (expected * weight).sum())
        found = scorer(batch, per_token=True)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=2e-5)
        difference = gradient(scorer.model, (found * weight).sum()) - wanted
        assert difference.abs().max() < 1e-5 * wanted.abs().max()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own
@pytest.mark.usefixtures("flex_backward")
def test_one_kernel_too_many_is_an_error_and_never_dense_scores() -> None:
    batch = tree_batch([random_tree(np.random.default_rng(0), 2)], "flex")
    with torch._dynamo.config.patch(recompile_limit=1):
        SequenceScorer(tiny("llama"), flex=True)(batch)
        with pytest.raises(FailOnRecompileLimitHit):
            SequenceScorer(tiny("gpt2"), flex=True)(batch)  # no groups of heads: another kernel


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # torch's own
@pytest.mark.usefixtures("flex_backward")
def test_more_head_sizes_than_dynamos_own_limit_have_kernels_of_their_own() -> None:
    tree = attention.TreeAttention(batch=tree_batch([random_tree(np.random.default_rng(0), 2)], "flex"))
    packed = attention.TreeAttention(batch=tree_batch([random_tree(np.random.default_rng(0), 2)], "packed"))
    tokens = packed.batch.input_ids.shape[1]
    layer = torch.nn.Module()
    with torch.no_grad():
        for size in range(8, 8 + DYNAMOS_OWN_LIMIT + 2):
            states = torch.randn(3, 1, 2, 128, size).unbind()
            found = attention.tree_attention(layer, *states, None, tree=tree)[0][:, :tokens]
            real = [part[:, :, :tokens] for part in states]
            expected = attention.tree_attention(layer, *real, None, tree=packed)[0]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_scores_with_sinks_are_left_to_other_layouts() -> None:
    states = torch.zeros(1, 2, 128, 8)
    batch = tree_batch([random_tree(np.random.default_rng(0), 2)], "flex")
    with pytest.raises(NotImplementedError, match="sinks"):
        attention.tree_attention(
            torch.nn.Module(),
            states,
            states,
            states,
            None,
            tree=attention.TreeAttention(batch=batch),
            s_aux=torch.zeros(2),
        )


@pytest.mark.parametrize(
    ("family", "windows"),
    [("gpt2", [None]), ("qwen2", [None]), ("mistral", [WINDOW]), ("gemma3_text", [None, WINDOW])],
)
def test_the_windows_of_a_family(family: str, windows: list[int | None]) -> None:
    assert windows_of(tiny(family).config) == windows


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
