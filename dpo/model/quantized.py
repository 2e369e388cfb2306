"""Frozen bases in 4 bits, through bitsandbytes: NormalFloat, quantized twice (QLoRA, arXiv 2305.14314).

What is computed is the function of the weights that 4 bits can hold: products take them back to the compute
type, in passes with and without gradients alike, so that policy, reference and merged export agree.
bitsandbytes is an optional dependency and imported only in functions.
"""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpo.config import ModelConfig
from dpo.errors import UserError

BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Of a weight: 4 bits, an 8-bit scale for every 64 and a float32 scale for every 256 of these."""
LIBRARY = "bitsandbytes"


def check_quantization(model: ModelConfig) -> None:
    """Raises UserError if bitsandbytes is needed and not installed."""
    if model.quantization is not None and find_spec(LIBRARY) is None:
        raise UserError(
            f"model.quantization: {model.quantization}; weights in 4 bits need {LIBRARY}, which is not "
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
    float32: log-probs of a 135M model then moved by 0.04 nats a token.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            vars(module)["support_avx512bf16_for_cpu"] = False


def plain(weight: Tensor) -> Tensor:
    """The values of a weight that may be quantized, on its device; others are returned as they are."""
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


def packed_weights(model: PreTrainedModel) -> list[Tensor]:
    """The weights that `loading_options` puts into 4 bits: of all linear layers but the output layer.

    Args:
        model: With all weights in full, on any device, with or without an adapter.
    """
    head = model.get_output_embeddings()
    linear = (module for module in model.modules() if isinstance(module, nn.Linear | Conv1D))
    return [layer.weight for layer in linear if layer is not head and not layer.weight.requires_grad]
