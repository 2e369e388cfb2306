"""Attention over shared-prefix trees, behind transformers' own interface.

`TREE_ATTENTION` is an attention implementation that models are set to while they compute packed rows: each
token attends to its own sequence only, and nothing else is computed. Everywhere else a model has its own,
because families look at its name: DeepSeek-V3.2 selects keys under "sdpa" and "eager" only. `dense_masks`
does the same for models with attention code of their own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo.data.key_blocks import KeyBlocks
from dpo.data.pieces import Pieces
from dpo.data.trees import TreeBatch
from dpo.model.varlen import varlen_attention

TREE_ATTENTION = "shared_prefix_tree"
REPLACED = "sdpa"
"""The implementation of models whose attention it may replace."""
KERNELS = 64
"""Most variants of FlexAttention's kernel in a process: head sizes, groups of heads, windows, compute types,
with and without gradients. One more is an error; torch's own limit of 8 would fall back to dense scores."""
torch._dynamo.config.recompile_limit = max(KERNELS, torch._dynamo.config.recompile_limit)
compiled_flex = torch.compile(flex_attention, fullgraph=True)
MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Batch, head, query, key -> whether the query attends to the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeAttention:
    """What the tokens of a packed row attend to; masks are made once per batch and shared by its layers."""

    batch: TreeBatch
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    """By number of queries, number of keys and window."""
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)
    """By window."""

    @property
    def piece_lengths(self) -> list[int]:
        """Tokens of each piece with its own attention: a segment, or a prompt with its only completion."""
        pieces = [segments if len(segments) > 2 else (sum(segments),) for segments in self.batch.trees]
        return [*chain.from_iterable(pieces)]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def pieces(self) -> Pieces:
        """What the layout `varlen` computes."""
        return self.batch.pieces

    def mask(self, num_queries: int, num_keys: int, window: int | None) -> Tensor | None:
        """Which keys of a sequence its last queries attend to.

        Args:
            num_queries: Number of queries, the last of the sequence.
            num_keys: Number of keys, from the sequence's first token on.
            window: Number of positions that a query looks back, its own included; None without a limit.

        Returns:
            (num_queries, num_keys) bool, or None where a plain causal mask is right.
        """
        if num_queries == num_keys and (window is None or num_keys <= window):
            return None
        key = num_queries, num_keys, window
        if key not in self.masks:
            keys = torch.arange(num_keys, device=self.batch.input_ids.device)
            distance = keys[num_keys - num_queries :, None] - keys[None, :]
            visible = distance >= 0
            self.masks[key] = visible if window is None else visible & (distance < window)
        return self.masks[key]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def block_mask(self, window: int | None) -> BlockMask:
        """FlexAttention's mask of the row: blocks that no token attends to are skipped.

        Args:
            window: As in `mask`; a number, since a tensor would make the host wait for the device.
        """
        if window not in self.block_masks:
            device, width = self.batch.input_ids.device, self.batch.input_ids.shape[1]
            blocks = KeyBlocks(*(part.to(device) for part in self.batch.blocks_of(window)))
            self.block_masks[window] = BlockMask.from_kv_blocks(
                blocks.partial_counts,
                blocks.partial,
                blocks.full_counts,
                blocks.full,
                mask_mod=mask_function(self.batch, window),
                seq_lengths=(width, width),
            )
        return self.block_masks[window]


def mask_function(batch: TreeBatch, window: int | None) -> MaskFunction:
    """Whether one token of a packed row attends to another, as FlexAttention asks it."""
    segments, prefixes, positions = batch.segments[0], batch.prefixes[0], batch.positions[0]

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        related = (segments[key] == segments[query]) | (segments[key] == prefixes[query])
        return related & (positions[query] >= positions[key])

    if window is None:
        return visible
    limit = window

    def in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(batch, head, query, key) & (positions[query] - positions[key] < limit)

    return in_window


def tree_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    tree: TreeAttention,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """One layer's attention, in the signature of transformers' interface.

    Args:
        module: The attention layer.
        query: (1, heads, T, d) queries.
        key: (1, key heads, T, d) keys.
        value: (1, key heads, T, d) values.
        attention_mask: From transformers; a placeholder.
        scaling: Factor of the scores.
        tree: The trees of the row.
        sliding_window: Number of positions that a token looks back, its own included.
        options: Passed on to the implementation.

    Returns:
        (1, T, heads, d) outputs, and None for the attention weights.
    """
    if tree.batch.layout == "flex":
        return _flex(query, key, value, tree.block_mask(sliding_window), scaling, **options), None
    options.pop("is_causal", None)
    if tree.batch.layout == "varlen":
        return varlen_attention(query, key, value, tree.pieces(), sliding_window, scaling, **options), None
    return _in_pieces(module, query, key, value, scaling, tree, sliding_window, **options), None


@torch.compiler.disable  # type: ignore[untyped-decorator]  # its calls depend on every batch's lengths
def _in_pieces(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    tree: TreeAttention,
    window: int | None,
    **options: Any,
) -> Tensor:
    """(1, T, heads, d) outputs, with one SDPA call for each segment."""

    def attend(*states: Tensor) -> Tensor:
        queries, keys, values = (part.transpose(1, 2) for part in states)
        mask = tree.mask(queries.shape[2], keys.shape[2], window)
        attended: Tensor = sdpa_attention_forward(
            module,
            queries,
            keys,
            values,
            None if mask is None else mask[None, None],
            scaling=scaling,
            is_causal=mask is None,
            **options,
        )[0]
        return attended

    # Pieces of (1, t, heads, d) are contiguous in memory, so that splitting and joining them is cheap. One
    # call splits them all, since the backward pass of every slice would allocate a whole row.
    lengths = tree.piece_lengths
    pieces = zip(*(states.transpose(1, 2).split(lengths, 1) for states in (query, key, value)), strict=True)
    outputs: list[Tensor] = []
    for segments in tree.batch.trees:
        queries, prompt_keys, prompt_values = next(pieces)
        outputs.append(attend(queries, prompt_keys, prompt_values))
        for _ in segments[1:] if len(segments) > 2 else ():
            queries, keys, values = next(pieces)
            keys, values = torch.cat([prompt_keys, keys], 1), torch.cat([prompt_values, values], 1)
            outputs.append(attend(queries, keys, values))
    return torch.cat(outputs, 1)


def _flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: BlockMask,
    scaling: float | None,
    *,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **ignored: Any,
) -> Tensor:
    """(1, T, heads, d) outputs of FlexAttention.

    Raises:
        NotImplementedError: The model adds attention sinks or a bias to the scores; `dpo.model.probe` then
            takes another layout.
    """
    if s_aux is not None or position_bias is not None:
        raise NotImplementedError("FlexAttention with sinks or a bias of positions")

    outputs: Tensor = compiled_flex(
        query,
        key,
        value,
        score_mod=None if softcap is None else _capped(softcap),
        block_mask=blocks,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return outputs.transpose(1, 2).contiguous()


def _capped(cap: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return capped


def attend(model: PreTrainedModel, implementation: str) -> None:
    """Sets the attention implementation of a model, if it has another."""
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)


def restore_attention(model: PreTrainedModel) -> None:
    """Gives a model that computed packed rows its own attention again."""
    if model.config._attn_implementation == TREE_ATTENTION:
        attend(model, REPLACED)


@contextmanager
def written(model: PreTrainedModel) -> Iterator[None]:
    """Within the block the model is as its authors wrote it: its own attention, in evaluation mode."""
    ours = model.config._attn_implementation
    learning = [module for module in model.modules() if module.training]
    restore_attention(model)
    model.eval()
    try:
        yield
    finally:
        attend(model, ours)
        for module in learning:
            module.training = True


def windows_of(config: PreTrainedConfig) -> list[int | None]:
    """How far back each type of a model's layers looks: numbers of positions, None without a limit.

    Args:
        config: Of the model.
    """
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    return [window if _slides(config, kind) else None for kind in _kinds(config)]


def _kinds(config: PreTrainedConfig) -> list[str]:
    """The types of a model's layers; one without a name where its config has none."""
    return sorted(set(getattr(config, "layer_types", None) or [""]))


def _slides(config: PreTrainedConfig, kind: str) -> bool:
    return "sliding" in kind if kind else getattr(config, "use_sliding_window", True)


def dense_masks(batch: TreeBatch, config: PreTrainedConfig, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
    """What each token attends to, as an additive mask for a model's own attention code.

    Args:
        batch: In the layout `trees`.
        config: The model's config; its sliding window becomes part of the mask, by distance of positions.
        dtype: Of the mask.

    Returns:
        (R, 1, T, T) with 0 or the lowest number of `dtype`; a mask per type for models with layers of
        several types.
    """
    config = config.get_text_config()
    masks = [_dense(batch, window, dtype) for window in windows_of(config)]
    return masks[0] if len(masks) == 1 else dict(zip(_kinds(config), masks, strict=True))


def _dense(batch: TreeBatch, window: int | None, dtype: torch.dtype) -> Tensor:
    own, keys = batch.segments[:, :, None], batch.segments[:, None, :]
    distance = batch.positions[:, :, None] - batch.positions[:, None, :]
    visible = ((keys == own) | (keys == batch.prefixes[:, :, None])) & (distance >= 0)
    if window is not None:
        visible = visible & (distance < window)
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]


AttentionInterface.register(TREE_ATTENTION, tree_attention)
AttentionMaskInterface.register(TREE_ATTENTION, sdpa_mask)
