"""Runs the projection's Triton kernels in Python, for test_projection_kernels.py.

In a process of its own: Triton decides when it is imported whether kernels are interpreted. Writes a JSON
object to stdout: case -> the largest difference from the sliced path, of log-probs and of each gradient.
"""

import json
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from dpo.model import projection, projection_kernels
from dpo.model.projection import Kernels, TokenLogProbs
from dpo.planning.stand_ins import TwoKernels

VOCABULARY, WIDTH, TOKENS = 2500, 8, 6
KINDS: dict[str, dict[str, float]] = {
    "plain": {},
    "scaled": {"logit_scale": 0.25},
    "capped": {"final_logit_softcapping": 2.0},
    "both": {"logit_scale": 0.5, "final_logit_softcapping": 1.5},
}
OF_EACH_ROW = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0, -1.0])


def layer_of(head: nn.Linear, kernels: Any, values: dict[str, float]) -> TokenLogProbs:
    config = SimpleNamespace(**values)
    config.get_text_config = lambda: config
    layer = TokenLogProbs(head, config)  # type: ignore[arg-type]
    layer.kernels = kernels
    return layer


def inputs(dtype: torch.dtype, *, bias: bool = False) -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype)
    targets = torch.tensor([0, 1023, 1024, 2047, 2048, VOCABULARY - 1])  # the ends of every slice
    return head, torch.randn(TOKENS, WIDTH, dtype=dtype, requires_grad=True), targets


def found(layer: TokenLogProbs, hidden: Tensor, targets: Tensor) -> list[Tensor]:
    """Log-probs, and the gradients of hidden states, weights and bias."""
    logps = layer(hidden, targets)
    return [
        logps.detach(),
        *torch.autograd.grad((logps * OF_EACH_ROW).sum(), [hidden, *layer.head.parameters()]),
    ]


def compared(kind: str, dtype: torch.dtype, *, bias: bool) -> list[float]:
    head, hidden, targets = inputs(dtype, bias=bias)
    ours = found(layer_of(head, projection_kernels, KINDS[kind]), hidden, targets)
    plain = found(layer_of(head, False, KINDS[kind]), hidden, targets)
    assert all(one.dtype == other.dtype for one, other in zip(ours, plain, strict=True))
    return [float((one - other).abs().max()) for one, other in zip(ours, plain, strict=True)]


def allocated(kernels: Kernels) -> list[object]:
    """What comes back from both kernels, and whether the second one writes over its slice."""
    logits, rows = torch.randn(TOKENS, 1024), torch.zeros(TOKENS)
    targets = torch.zeros(TOKENS, dtype=torch.int64)
    made = kernels.reduced(logits, targets, 0, 1.0, None)
    slopes = kernels.slopes_(logits, targets, 0, 1.0, None, rows, rows)
    return [*((tensor.shape, tensor.dtype) for tensor in made), slopes is logits]


def main() -> None:
    differences: dict[str, list[float]] = {}
    for kind in KINDS:
        for bias in (False, True):
            for slices, kept in ((1, 2**28), (3, 2**28), (3, 1024 * TOKENS * 4), (3, 0)):
                projection.KEPT_BYTES = kept
                projection.SLICE_ELEMENTS["cpu"] = 1024 * TOKENS if slices == 3 else 2**22
                case = f"float32, {kind}, bias {bias}, {slices} slices, {kept} bytes kept"
                differences[case] = compared(kind, torch.float32, bias=bias)
            differences[f"bfloat16, {kind}, bias {bias}"] = compared(kind, torch.bfloat16, bias=bias)
    head, hidden, targets = inputs(torch.float32)
    hidden = hidden.detach()
    layer = layer_of(head, projection_kernels, {})
    head.requires_grad_(requires_grad=False)
    differences["large"] = [float(layer(hidden * 1e4, targets).abs().max())]
    differences["no rows"] = [float(layer(hidden[:0], targets[:0]).numel())]
    differences["not a number"] = [float((~layer(hidden * torch.nan, targets).isnan()).sum())]
    differences["stand-in"] = [float(allocated(projection_kernels) != allocated(TwoKernels()))]
    print(json.dumps(differences))


if __name__ == "__main__":
    main()
