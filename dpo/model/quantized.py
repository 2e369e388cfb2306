"""Frozen bases in 4 or 8 bits, through bitsandbytes: NormalFloat, quantized twice (QLoRA, arXiv 2305.14314),
or integers with a scale for every row (arXiv 2208.07339).

What is computed is the function of the weights that so few bits can hold: products take them back to the
compute type, in passes with and without gradients alike, so that policy, reference and merged export agree.
bitsandbytes is an optional dependency and imported only in functions.
"""

from collections.abc import Iterable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo.config import ModelConfig
from dpo.errors import UserError

BYTES = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
"""Of a weight: 4 bits, an 8-bit scale for every 64 and a float32 scale for every 256 of these; or 8 bits."""
SCALES = "scales_of_8_bits"
"""Name of the buffer that holds the scales of a layer in 8 bits."""
INT8_STEPS = 127
"""Of the largest weight of a row, in 8 bits."""
ROW_BYTES = {"nf4": 0, "int8": 4}
"""Of a row of weights: its float32 scale."""
LIBRARY = "bitsandbytes"


def check_quantization(model: ModelConfig) -> None:
    """Raises UserError if bitsandbytes is needed and not installed."""
    if model.quantization is not None and find_spec(LIBRARY) is None:
        raise UserError(
            f"model.quantization: {model.quantization}; such weights need {LIBRARY}, which is not "
            'installed: pip install "cached-dpo[lora,bitsandbytes]", or leave model.quantization out'
        )


def scheme(model: ModelConfig) -> str | None:
    """The quantization and the version of its library: what decides the weights' values besides the files."""
    if model.quantization is None:
        return None
    try:
        return f"{model.quantization} {LIBRARY} {version(LIBRARY)}"
    except PackageNotFoundError:
        check_quantization(model)
        raise


def loading_options(model: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told to quantize on the CPU; the same on every machine. Empty without.

    Args:
        model: Which quantization.
        dtype: Type of products, and of the weights that stay as they are.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if model.quantization is None:
        return {}
    check_quantization(model)
    from transformers import BitsAndBytesConfig

    if model.quantization == "int8":
        options = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    else:
        options = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=model.quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return {"quantization_config": options, "device_map": {"": "cpu"}}


def compute_plainly(model: PreTrainedModel) -> None:
    """Makes quantized layers compute without gradients as they do with them.

    On CPUs with such instructions bitsandbytes would multiply in bfloat16 when nothing is trained, also in
    float32: log-probs of a 135M model then moved by 0.04 nats a token. With weights in 8 bits it would round
    activations to 8 bits too, on GPUs always and on CPUs when nothing is trained.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False
        if type(module).__name__ == "Linear8bitLt":
            weight: Any = module.weight
            weight.CB = None  # its data once more, which would stay on the host
            # As bits, so that no change of the model's type rounds it; a buffer goes where the model goes.
            module.register_buffer(SCALES, weight.SCB.view(torch.int32), persistent=False)
            module.forward = partial(_product_of_8_bits, module)


def _product_of_8_bits(layer: nn.Module, x: Tensor) -> Tensor:
    """(..., in) -> (..., out) product and bias of a layer in 8 bits, without gradient to its weights."""
    weight, bias, scales = layer.weight, layer.bias, getattr(layer, SCALES).view(torch.float32)
    assert isinstance(weight, Tensor)
    product: Tensor = _Product.apply(x, weight, scales)  # type: ignore[no-untyped-call]
    return product + bias.to(product.dtype) if isinstance(bias, Tensor) else product


class _Product(torch.autograd.Function):
    """Of activations and a weight in 8 bits, which the backward pass takes back to their type once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
        """(..., in), (out, in) int8 and (out,) float32 -> (..., out)."""
        ctx.packed = weight.data, scales  # they do not change, and are no activations
        return x @ _unpacked(weight.data, scales, x.dtype).T

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None, None]:
        """(..., out) -> (..., in)."""
        (slope,), (weight, scales) = slopes, ctx.packed
        return slope @ _unpacked(weight, scales, slope.dtype), None, None


def _unpacked(weight: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(out, in) values of a weight in 8 bits, rounded once to the type."""
    return (weight * (scales / INT8_STEPS)[:, None]).to(dtype)


def plain(weight: Tensor) -> Tensor:
    """The values of a weight that may be quantized, on its device; others are returned as they are."""
    if (scales := getattr(weight, "SCB", None)) is not None:
        return _unpacked(weight.data, scales.to(weight.device), torch.float32)
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    values: Tensor = dequantize_4bit(weight.data, state)
    return values


def whole_shape(parameter: Tensor) -> torch.Size:
    """Shape of the whole parameter, also where ZeRO-3 has sharded it or two weights are in a byte."""
    state = getattr(parameter, "quant_state", None)
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape) if state is None else state.shape
    return shape


def num_elements(parameters: Iterable[Tensor]) -> int:
    """Elements of whole parameters."""
    return sum(whole_shape(parameter).numel() for parameter in parameters)


def packed_bytes(weight: Tensor, quantization: str) -> float:
    """What a matrix takes in 4 or 8 bits, with its scales.

    Args:
        weight: In full, on any device.
        quantization: `model.quantization`.
    """
    return BYTES[quantization] * weight.numel() + ROW_BYTES[quantization] * len(weight)


def packed_weights(model: PreTrainedModel) -> list[Tensor]:
    """The weights that `loading_options` quantizes; see `packed_layers`."""
    return [layer.weight for layer in packed_layers(model)]


def packed_layers(model: PreTrainedModel) -> list[nn.Linear | Conv1D]:
    """The layers whose weights `loading_options` quantizes: all linear ones but the output layer.

    Args:
        model: With all weights in full, on any device, with or without an adapter.
    """
    head = model.get_output_embeddings()
    linear = (module for module in model.modules() if isinstance(module, nn.Linear | Conv1D))
    return [layer for layer in linear if layer is not head and not layer.weight.requires_grad]
