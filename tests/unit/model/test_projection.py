"""The sliced projection against log-softmax over the whole vocabulary, values and gradients."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import dpo.model.projection as projection
from dpo.model.projection import TokenLogProbs

VOCABULARY, WIDTH, TOKENS = 2500, 8, 6
KINDS = {
    "plain": {},
    "scaled": {"logit_scale": 0.25},
    "divided": {"logits_scaling": 3.0},
    "capped": {"final_logit_softcapping": 2.0},
    "capped, as RecurrentGemma names it": {"logits_soft_cap": 2.0},
    "all": {"logit_scale": 0.5, "logits_scaling": 2.0, "final_logit_softcapping": 1.5},
}


@pytest.fixture(autouse=True, params=["one slice", "three slices"])
def slices(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "three slices":  # of 1024, 1024 and 452
        monkeypatch.setitem(projection.SLICE_ELEMENTS, "cpu", 1024 * TOKENS)


def config(**values: float) -> Any:
    made = SimpleNamespace(**values)
    made.get_text_config = lambda: made
    return made


def inputs(*, bias: bool = False) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
    targets = torch.tensor([0, 1023, 1024, 2047, 2048, VOCABULARY - 1])  # the ends of every slice
    return head, torch.randn(TOKENS, WIDTH, requires_grad=True), targets


def of_all(head: nn.Linear, hidden: Tensor, values: dict[str, float]) -> Tensor:
    logits = head(hidden).double() * values.get("logit_scale", 1) / values.get("logits_scaling", 1)
    if cap := values.get("final_logit_softcapping", values.get("logits_soft_cap")):
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1)


def expected(head: nn.Linear, hidden: Tensor, targets: Tensor, values: dict[str, float]) -> Tensor:
    return of_all(head, hidden, values).gather(1, targets[:, None])[:, 0]


def gradients(logps: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    weights = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0], dtype=logps.dtype)
    return torch.autograd.grad((logps * weights).sum(), of)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_sums_of_squared_probabilities_are_those_of_a_full_softmax(kind: str, bias: bool) -> None:
    head, hidden, targets = inputs(bias=bias)
    both = TokenLogProbs(head, config(**KINDS[kind]))(hidden, targets, squares=True)
    squares = (2 * of_all(head, hidden, KINDS[kind])).logsumexp(1)
    assert torch.allclose(both[:, 1].double(), squares, atol=1e-5)
    plain = TokenLogProbs(head, config(**KINDS[kind]))(hidden, targets)
    assert torch.equal(both[:, 0], plain)
    for found, wanted in zip(gradients(both.sum(1), hidden), gradients(plain, hidden), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kept_bytes", [0, 1024 * TOKENS * 4, 2**28])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_a_full_softmax(
    kind: str, bias: bool, kept_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projection, "KEPT_BYTES", kept_bytes)  # none, one slice, all
    head, hidden, targets = inputs(bias=bias)
    found = TokenLogProbs(head, config(**KINDS[kind]))(hidden, targets)
    wanted = expected(head, hidden, targets, KINDS[kind])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    of = (hidden, *head.parameters())
    for ours, theirs in zip(gradients(found, *of), gradients(wanted, *of), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_gradients_pass_finite_differences() -> None:
    head, hidden, targets = inputs(bias=True)
    head.double()
    layer = TokenLogProbs(head, config(final_logit_softcapping=2.0))
    wide = hidden.detach().double()

    def loss(states: Tensor) -> Tensor:
        return layer(states, targets).double().sum()

    states = wide.clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(states), states)
    step = 1e-3
    for index in ((0, 0), (3, 5), (5, 7)):
        moved = torch.zeros_like(wide)
        moved[index] = step
        slope = (loss(wide + moved) - loss(wide - moved)).item() / (2 * step)
        assert float(found[index]) == pytest.approx(slope, rel=2e-2, abs=1e-4)  # log-probs are float32


def test_large_logits_stay_finite_and_no_tokens_give_no_gradient() -> None:
    head, hidden, targets = inputs()
    layer = TokenLogProbs(head, config())
    found = layer(hidden * 1e4, targets)
    assert torch.isfinite(found).all()
    assert all(torch.isfinite(part).all() for part in gradients(found, hidden, head.weight))
    nothing = layer(hidden[:0], targets[:0])
    assert nothing.shape == (0,)
    assert not torch.autograd.grad(nothing.sum(), head.weight)[0].any()


def test_a_frozen_head_gets_no_gradient() -> None:
    head, hidden, targets = inputs(bias=True)
    head.requires_grad_(requires_grad=False)
    TokenLogProbs(head, config())(hidden, targets).sum().backward()
    assert hidden.grad is not None
    assert head.weight.grad is None


@pytest.mark.parametrize("wide_head", [False, True])
def test_sums_are_float32_also_in_bfloat16(wide_head: bool) -> None:
    """Some authors keep their output layer in float32."""
    head, hidden, targets = inputs()
    wanted = expected(head, hidden, targets, {})
    head, hidden = head if wide_head else head.bfloat16(), hidden.bfloat16()
    found = TokenLogProbs(head, config())(hidden, targets)
    assert found.dtype == torch.float32
    # Each bf16 logit has an error of 2^-8; a sum over 2500 of them in bf16 would have a far larger one.
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=0.02)
    (gradient,) = torch.autograd.grad(found.sum(), head.weight)
    assert gradient.dtype == head.weight.dtype


def test_slices_are_summed_in_float32_also_in_bfloat16() -> None:
    torch.manual_seed(0)
    head = nn.Linear(64, 16 * 1024, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(TOKENS, 64, dtype=torch.bfloat16, requires_grad=True)
    layer, targets = TokenLogProbs(head, config()), torch.arange(TOKENS)
    found = []
    for num_slices in (1, 16):
        layer.slice_elements = TOKENS * head.out_features // num_slices
        found.append(torch.autograd.grad(layer(hidden, targets).sum(), hidden)[0].float())
    one, many = found
    # The sums are rounded once, alike but where they lie between two numbers of bf16; rounding each of 16
    # products would move nearly all of them.
    assert (one != many).float().mean() < 0.01


class _NothingWidened(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert "_to_copy" not in str(func), "a matrix is copied to another type"
        return func(*args, **(kwargs or {}))


def test_on_a_device_with_such_a_kernel_no_matrix_is_widened() -> None:
    narrow = torch.empty(4, 8, dtype=torch.bfloat16, device="meta")
    total = torch.empty(4, 4, device="meta")
    with _NothingWidened():
        projection._add_product(total, torch.empty(4, 8, device="meta"), narrow, narrow.T, "cuda")


def test_the_full_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(projection.SLICE_ELEMENTS, "cpu", 1024 * TOKENS)
    monkeypatch.setattr(projection, "KEPT_BYTES", 0)
    sizes: list[int] = []
    plain: Callable[..., Tensor] = nn.functional.linear

    def measured(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        sizes.append(len(states) * len(weight))
        return plain(states, weight, bias)

    monkeypatch.setattr(projection.nn.functional, "linear", measured)
    head, hidden, targets = inputs()
    TokenLogProbs(head, config())(hidden, targets).sum().backward()
    assert max(sizes) == 1024 * TOKENS
    assert sum(sizes) == 2 * VOCABULARY * TOKENS  # once in the forward and once in the backward pass
