"""Stand-ins for kernels of GPUs in a rehearsal: they keep what the kernels keep, and compute nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations import moe
from transformers.masking_utils import sdpa_mask

ONE_KERNEL = "rehearsed_one_kernel"
"""Attention of a whole row by one kernel, like FlexAttention on GPUs: it keeps its inputs, its output and one
number per row and head."""


class _OneKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = torch.empty(query.shape[:-1], dtype=torch.float32, device=query.device)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(states) for states in ctx.saved_tensors[:3])


def _one_kernel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    output: Tensor = _OneKernel.apply(query, key, value)  # type: ignore[no-untyped-call]  # torch has no types
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def experts_of_any_dtype() -> Iterator[None]:
    """Within the block, products with experts are rehearsed in float32 too, where torch knows no shapes."""
    known = moe._can_use_grouped_mm
    moe._can_use_grouped_mm = lambda input, weight, offs: weight.dtype == torch.bfloat16
    try:
        yield
    finally:
        moe._can_use_grouped_mm = known


AttentionInterface.register(ONE_KERNEL, _one_kernel)
AttentionMaskInterface.register(ONE_KERNEL, sdpa_mask)
