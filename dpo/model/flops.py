"""The floating-point operations that log-probabilities need at least, and the peak rates of devices.

Training divides the two for perf/mfu, and `plan` estimates times. Operations are counted for shared-prefix
trees without padding or recomputation, so that work saved by an implementation is not counted as speed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from dpo.data.dataset import TokenizedDataset
from dpo.model.quantized import whole_shape

Float64s = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Multiply-adds of a model's forward pass."""

    token: int
    """Per token, in the blocks' matrices: the number of weights that apply to it."""
    seen: int
    """Per (token, token that it attends to), in all layers: query-key and score-value products."""
    prediction: int
    """Per predicted token, in the output layer."""


NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
NUM_ACTIVE = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "num_experts_per_token")
"""Keys of configs: the experts of a layer, and how many of them a token is routed to."""
LINEAR = ("minimaxlightning", "rwkv")
"""Starts of class names of attention whose work does not grow with the length."""
PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A6000": 155.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
}
"""Part of a GPU's name -> dense bfloat16 TFLOP/s from its data sheet; the first match counts."""


def known_peak(device_name: str) -> float | None:
    """Peak of a GPU in dense bfloat16, in FLOP/s; None if it is not in the table.

    Args:
        device_name: From `torch.cuda.get_device_name`.
    """
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def work_of(model: PreTrainedModel) -> Work:
    """The work of a model from the shapes of its weights.

    In a mixture of experts, a token counts for as many experts as it is routed to. A block without attention
    has none; what its recurrence does per token is not counted.

    Args:
        model: May be on the meta device or sharded by ZeRO-3.

    Raises:
        ValueError: The model's blocks are not in a ModuleList, so that they cannot be counted.
    """
    config = model.config.get_text_config()
    blocks = next((module for module in model.modules() if isinstance(module, nn.ModuleList)), None)
    head = model.get_output_embeddings()
    if blocks is None or not isinstance(getattr(head, "weight", None), nn.Parameter):
        raise ValueError(f"{type(model).__name__}: expected blocks in a ModuleList, and an output layer")
    token = 0.0
    for name, parameter in blocks.named_parameters():
        shape = whole_shape(parameter)
        if len(shape) > 1:
            token += math.prod(shape) * _share_of_tokens(name, shape, config)
    seen = sum(_attention(block, config, number) for number, block in enumerate(blocks))
    return Work(token=round(token), seen=seen, prediction=math.prod(whole_shape(head.weight)))


def _share_of_tokens(name: str, shape: torch.Size, config: PreTrainedConfig) -> float:
    """Part of the tokens that a weight applies to: less than 1 for those of experts."""
    experts, active = _first(config, NUM_EXPERTS), _first(config, NUM_ACTIVE)
    stacked = len(shape) == 3 and shape[0] == experts
    if experts and active and (stacked or ".experts." in name):
        return active / experts
    return 1.0


def _attention(block: nn.Module, config: PreTrainedConfig, number: int) -> int:
    """Multiply-adds per (token, token that it attends to) in a block."""
    names = [type(module).__name__.lower() for module in block.modules()]
    if not any("attention" in name and not name.startswith(LINEAR) for name in names):
        return 0
    layers = getattr(config, "per_layer_config", None)
    own = config if layers is None else layers[number]
    heads = int(getattr(own, "num_attention_heads", None) or 0)
    width = getattr(own, "head_dim", None) or (own.hidden_size // heads if heads else 0)
    keys, values = getattr(own, "qk_head_dim", None) or width, getattr(own, "v_head_dim", None) or width
    return int(heads * (keys + values))


def _first(config: PreTrainedConfig, keys: Sequence[str]) -> int | None:
    """The first of these keys that a config has as a number."""
    values = (getattr(config, key, None) for key in keys)
    return next((value for value in values if isinstance(value, int) and value), None)


def forward_flops(data: TokenizedDataset, work: Work) -> Float64s:
    """Operations of the forward pass of each group, as a shared-prefix tree.

    Prompt and completions are computed once each, attention only between tokens that attend to each other,
    and the output layer only where a completion token is predicted.

    Args:
        data: G groups.
        work: Of the model.

    Returns:
        (G,) floating-point operations: two per multiply-add.
    """
    completion = data.completion_tokens.astype(np.float64)
    completions = np.add.reduceat(completion, data.first_sequence)
    prompt = data.tree_tokens - completions
    squares = np.add.reduceat(completion * (completion + 1) / 2, data.first_sequence)
    seen = prompt * (prompt + 1) / 2 + prompt * completions + squares
    flops: Float64s = 2.0 * (work.token * data.tree_tokens + work.seen * seen + work.prediction * completions)
    return flops
