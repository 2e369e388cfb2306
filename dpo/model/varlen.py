"""Attention of the layout `varlen`: FlashAttention over pieces of different lengths, one kernel per layer.

For GPUs where FlexAttention does not run. In float32, which the kernel does not have, and on CPUs the same
pieces are computed one by one: so the probe compares their masks and gathers in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor
from torch.nn.attention import varlen

from dpo.data.pieces import Pieces


@torch.compiler.disable  # type: ignore[untyped-decorator]
def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pieces: Pieces,
    window: int | None,
    scaling: float | None,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **ignored: Any,
) -> Tensor:
    """(1, T, heads, d) outputs of one layer.

    Args:
        query: (1, heads, T, d) queries of a packed row.
        key: (1, key heads, T, d) keys.
        value: (1, key heads, T, d) values.
        pieces: Of the row.
        window: Number of positions that a token looks back, its own included; None without a limit.
        scaling: Factor of the scores.
        softcap: Of the scores; see below.
        s_aux: Attention sinks.
        position_bias: Added to the scores.
        ignored: Other options of transformers' interface.

    Raises:
        NotImplementedError: The model changes scores in a way that the kernel cannot; `dpo.model.probe` then
            takes another layout.
    """
    if softcap is not None or s_aux is not None or position_bias is not None:
        raise NotImplementedError("varlen attention with a soft cap, sinks or a bias of positions")
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))
    # Indexing, whose backward pass adds the keys' gradients in the same order in every run.
    keys, values = keys[pieces.keys], values[pieces.keys]
    if _kernel_takes(query):
        outputs = varlen.varlen_attn(
            queries.contiguous(),
            keys,
            values,
            pieces.query_starts,
            pieces.key_starts,
            pieces.most_queries,
            pieces.most_keys,
            scale=scaling,
            window_size=(-1 if window is None else window - 1, 0),
            enable_gqa=queries.shape[1] != keys.shape[1],
        )
        assert isinstance(outputs, Tensor)  # without return_aux
        return outputs[None]
    return one_by_one(queries, keys, values, pieces, window, scaling)[None]


def _kernel_takes(query: Tensor) -> bool:
    return query.is_cuda and query.dtype == torch.bfloat16


def one_by_one(
    queries: Tensor, keys: Tensor, values: Tensor, pieces: Pieces, window: int | None, scaling: float | None
) -> Tensor:
    """(T, heads, d) outputs, what the kernel computes; it waits for the device.

    Args:
        queries: (T, heads, d).
        keys: (K, key heads, d), gathered.
        values: (K, key heads, d), gathered.
        pieces: Of the row.
        window: As for `varlen_attention`.
        scaling: Factor of the scores.
    """
    outputs = []
    own = pieces.query_starts.diff().tolist()
    all_keys = pieces.key_starts.diff().tolist()
    split = zip(queries.split(own), keys.split(all_keys), values.split(all_keys), strict=True)
    for states in split:
        part, own_keys, own_values = (each.transpose(0, 1)[None] for each in states)
        last = own_keys.shape[2] - part.shape[2] + torch.arange(part.shape[2], device=part.device)
        distance = last[:, None] - torch.arange(own_keys.shape[2], device=part.device)
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        grouped = part.shape[1] != own_keys.shape[1]
        attended = F.scaled_dot_product_attention(
            part, own_keys, own_values, visible, scale=scaling, enable_gqa=grouped
        )
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)
