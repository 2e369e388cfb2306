"""The floating-point operations that log-probabilities need at least, and the peak rates of devices.

Training divides the two for perf/mfu, and `plan` estimates times. Operations are counted for shared-prefix
trees without padding or recomputation, so that work saved by an implementation is not counted as speed.
"""

import math
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from dpo.data.dataset import TokenizedDataset

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

    In a mixture of experts, a token counts for as many experts as it is routed to.

    Args:
        model: May be on the meta device or sharded by ZeRO-3.

    Raises:
        ValueError: The model's blocks are not in a ModuleList, so that they cannot be counted.
    """
    config = model.config.get_text_config()
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    share = getattr(config, "num_experts_per_tok", 1) / experts if experts else 1.0
    blocks = next((module for module in model.modules() if isinstance(module, nn.ModuleList)), None)
    head = model.get_output_embeddings()
    if blocks is None or head is None:
        raise ValueError(f"{type(model).__name__}: expected blocks in a ModuleList, and an output layer")
    shapes = [_shape(p) for p in chain.from_iterable(block.parameters() for block in blocks)]
    token = sum(
        round(math.prod(shape) * (share if len(shape) == 3 else 1.0)) for shape in shapes if len(shape) > 1
    )
    heads = int(config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    prediction = math.prod(_shape(head.weight))
    return Work(token=token, seen=2 * len(blocks) * heads * width, prediction=prediction)


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of the whole parameter, also where this rank has only a part of it."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


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
