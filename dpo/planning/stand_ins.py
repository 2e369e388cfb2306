"""Stand-ins in a rehearsal, for kernels of GPUs and quantized layers: they allocate what these allocate."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations import moe
from transformers.masking_utils import sdpa_mask
from transformers.pytorch_utils import Conv1D

from dpo.model.offload import Offload
from dpo.model.quantized import packed_layers

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


class TwoKernels:
    """The Triton kernels of the output projection: one reads a slice, one writes over it."""

    def reduced(self, logits: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Two numbers per row."""
        totals, picked = (torch.empty(len(logits), dtype=torch.float32) for _ in range(2))
        return totals, picked

    def slopes_(self, logits: Tensor, *_: Any, **__: Any) -> Tensor:
        """The slice."""
        return logits


class _OfQuantized(torch.autograd.Function):
    """A product with values that are made in each pass, from a weight that is kept in few bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, quantization: str) -> Tensor:
        ctx.packed = weight, quantization
        return x @ _values(weight, quantization, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        (slope,), (weight, quantization) = slopes, ctx.packed
        return slope @ _values(weight, quantization, slope.dtype), None, None


def _values(weight: Tensor, quantization: str, dtype: torch.dtype) -> Tensor:
    """Allocates what taking a weight back to the compute type does; 8 bits go by way of float32."""
    first = torch.float32 if quantization == "int8" else dtype
    return torch.empty(weight.shape, dtype=first, device=weight.device).to(dtype)


class Dropped(Offload):
    """Moves activations to a host that holds nothing."""

    def to_host(self, tensor: Tensor) -> Any:
        """What is needed to allocate it again."""
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    def from_host(self, waiting: Any) -> Tensor:
        """As large as it was."""
        shape, stride, dtype, device = waiting
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def quantize(model: PreTrainedModel, quantization: str) -> None:
    """Makes the layers that would be quantized allocate their values in each pass; changed in place.

    Args:
        model: Made of FakeTensors, with all weights in full.
        quantization: `model.quantization`.
    """
    for layer in packed_layers(model):
        layer.forward = partial(_product, layer, quantization)  # type: ignore[method-assign]


def _product(layer: nn.Linear | Conv1D, quantization: str, x: Tensor) -> Tensor:
    weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
    product: Tensor = _OfQuantized.apply(x, weight, quantization)  # type: ignore[no-untyped-call]
    return product if layer.bias is None else product + layer.bias


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
