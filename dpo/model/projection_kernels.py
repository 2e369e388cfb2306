"""Triton kernels of the output projection on a GPU: one reads a slice of logits, one turns it into slopes.

The products around them are cuBLAS's. Without the kernels each slice is read and written about ten times, in
float32; with them it is read once forward, and read and written once backward, in its own type. All
arithmetic is float32, and nothing is added in an order that could change.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpo import terminal
from dpo.model.files import first_line

REDUCED, MADE = 4096, 1024
"""Columns that a program takes at once: of the reduction, and of the slopes."""
WARPS = 8


@triton.jit
def _shaped(logits, scale, cap, CAPPED: tl.constexpr):  # noqa: N803  (Triton's custom)
    logits = logits * scale
    if CAPPED:
        logits = cap * (2 * tl.sigmoid(2 * logits / cap) - 1)  # tanh, of which Triton has no portable form
    return logits


@triton.jit
def reduce_rows(
    logits, targets, totals, picked, start, columns, stride, scale, cap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """A program per row: log-sum-exp, and the logit of the row's target if it is in this slice, else 0."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(targets + row) - start
    highest = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    found = tl.zeros((), tl.float32)
    for first in range(0, columns, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < columns
        values = tl.load(logits + row * stride + at, mask=inside, other=0.0).to(tl.float32)
        values = tl.where(inside, _shaped(values, scale, cap, CAPPED), float("-inf"))
        found += tl.sum(tl.where((at == place) & inside, values, 0.0), 0)
        new = tl.maximum(highest, tl.max(values, 0))
        total = total * tl.exp(highest - new) + tl.sum(tl.exp(values - new), 0)
        highest = new
    tl.store(totals + row, highest + tl.log(total))
    tl.store(picked + row, found)


@triton.jit
def make_slopes(
    logits, targets, totals, outer, start, columns, stride, scale, cap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,  # noqa: N803
):  # fmt: skip
    """A program per row and `BLOCK` columns: writes the gradient of the product over the logits."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < columns
    place = tl.load(targets + row) - start
    address = logits + row * stride + at
    values = _shaped(tl.load(address, mask=inside, other=0.0).to(tl.float32), scale, cap, CAPPED)
    # d logp / d y = [target] - softmax(y)
    slopes = tl.where(at == place, 1.0, 0.0) - tl.exp(values - tl.load(totals + row))
    slopes = slopes * tl.load(outer + row) * scale
    if CAPPED:
        slopes = slopes * (1 - (values / cap) * (values / cap))
    tl.store(address, slopes.to(logits.dtype.element_ty), mask=inside)


@cache
def run_here() -> bool:
    """Whether the kernels run on this process's GPU: Triton needs a C compiler. Says once why not."""
    logits, targets = torch.zeros(1, 2, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
    try:
        totals, _ = reduced(logits, targets, 0, 1.0, None)
        slopes_(logits, targets, 0, 1.0, None, totals, totals)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of the compiler, the driver, or Triton
        terminal.warning(f"the output projection runs without its Triton kernels: {first_line(error)}")
        return False
    return True


def reduced(
    logits: Tensor, targets: Tensor, start: int, scale: float, cap: float | None
) -> tuple[Tensor, Tensor]:
    """What the log-probs need of a slice.

    Args:
        logits: (N, M) a slice of the product, without scaling and soft cap.
        targets: (N,) int64 token ids.
        start: The slice's first token.
        scale: Of the logits.
        cap: Their soft cap.

    Returns:
        (N,) float32 log-sum-exp of the slice, and (N,) float32 logit of the target, 0 where it is not here.
    """
    totals, picked = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    arguments = *logits.shape[1:], logits.stride(0), scale, cap or 1.0
    options = {"CAPPED": cap is not None, "BLOCK": REDUCED, "num_warps": WARPS}
    reduce_rows[(len(logits),)](logits, targets, totals, picked, start, *arguments, **options)
    return totals, picked


def slopes_(
    logits: Tensor,
    targets: Tensor,
    start: int,
    scale: float,
    cap: float | None,
    totals: Tensor,
    outer: Tensor,
) -> Tensor:
    """Overwrites a slice with the gradient of the product.

    Args:
        logits: (N, M) as for `reduced`; overwritten.
        targets: (N,) int64 token ids.
        start: The slice's first token.
        scale: Of the logits.
        cap: Their soft cap.
        totals: (N,) float32 log-sum-exp of the whole vocabulary.
        outer: (N,) float32 gradient of the log-probs.

    Returns:
        `logits`.
    """
    grid = len(logits), triton.cdiv(logits.shape[1], MADE)
    arguments = *logits.shape[1:], logits.stride(0), scale, cap or 1.0
    options = {"CAPPED": cap is not None, "BLOCK": MADE, "num_warps": WARPS}
    make_slopes[grid](logits, targets, totals, outer, start, *arguments, **options)
    return logits
