"""Compiled blocks are the same function: values, gradients, generation, and what the probe says."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from families import random_tree, tiny
from torch import Tensor

from dpo.data.trees import Layout, TreeBatch, tree_batch
from dpo.errors import UserError
from dpo.model import attention, compiled
from dpo.model.compiled import compile_blocks
from dpo.model.scorer import SequenceScorer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),  # torch's own
    pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Online softmax:UserWarning"),
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are traced, forward and backward, and the graphs run as they are: seconds less than inductor."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")


def scorers(family: str, *, checkpointing: bool = False, flex: bool = False) -> tuple[SequenceScorer, ...]:
    pair = SequenceScorer(tiny(family), flex=flex), SequenceScorer(tiny(family), flex=flex)
    pair[1].load_state_dict(pair[0].state_dict())
    for scorer in pair:
        if checkpointing:
            scorer.model.activation_checkpointing_enable({"use_reentrant": False})
            scorer.model.train()
    compile_blocks(pair[1].model)
    return pair


def batches(layout: Layout, scorer: SequenceScorer) -> Iterator[TreeBatch]:
    for seed in (0, 1, 2):
        rng = np.random.default_rng(seed)
        trees = [random_tree(rng, 3, longest=20 + 20 * seed), random_tree(rng, 2)]
        yield tree_batch(trees, layout).to(CPU, scorer.windows)


def gradient(scorer: SequenceScorer, logps: Tensor) -> Tensor:
    weights = [weight for weight in scorer.parameters() if weight.requires_grad]
    found = torch.autograd.grad(logps.sum(), weights, allow_unused=True)
    return torch.cat([part.flatten() for part in found if part is not None])


def compare(plain: SequenceScorer, ours: SequenceScorer, layout: Layout) -> None:
    for batch in batches(layout, plain):
        wanted, found = plain(batch, per_token=True), ours(batch, per_token=True)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5)
        expected = gradient(plain, wanted)
        assert (gradient(ours, found) - expected).abs().max() < 1e-5 * expected.abs().max()


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("family", "layout", "checkpointing"),
    [
        ("gpt2", "packed", True),
        ("gpt2", "rows", False),
        ("mistral", "packed", False),
        ("gpt2", "trees", True),
    ],
)
def test_compiled_blocks_are_the_same_function_in_batches_of_any_shape(
    family: str, layout: Layout, checkpointing: bool
) -> None:
    plain, ours = scorers(family, checkpointing=checkpointing)
    compare(plain, ours, layout)
    made = graphs()
    assert made > 0
    compare(plain, ours, layout)
    for seed in (7, 8, 9):  # other shapes again
        trees = [random_tree(np.random.default_rng(seed), 4, longest=30 + seed) for _ in range(2)]
        ours(tree_batch(trees, layout).to(CPU))
    assert graphs() == made


@pytest.mark.usefixtures("traced")
def test_flex_attention_in_compiled_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention import flex_attention

    traced = torch.compile(flex_attention.flex_attention, fullgraph=True, backend="aot_eager")
    monkeypatch.setattr(attention, "compiled_flex", traced)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    plain, ours = scorers("llama", flex=True)
    compare(plain, ours, "flex")


def test_inductors_code_on_this_cpu() -> None:
    plain, ours = scorers("llama")
    compare(plain, ours, "packed")


@pytest.mark.usefixtures("traced")
def test_generation_and_the_authors_own_form_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def counted(graph: Any, inputs: Any) -> Any:
        calls.append(graph)
        return graph.forward

    monkeypatch.setattr(compiled, "BACKEND", counted)
    _, ours = scorers("llama")
    ours.model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False, use_cache=True)
    single = tree_batch([random_tree(np.random.default_rng(0), 1)], "rows")
    with torch.no_grad():
        ours(single, as_written=True)
        assert calls == []
        ours(single)
        assert calls != []


def test_routed_experts_are_refused() -> None:
    with pytest.raises(UserError, match=r"model\.compile: true; the shapes of routed experts"):
        compile_blocks(tiny("mixtral"))
