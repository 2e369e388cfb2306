"""Rehearses a training step without memory: the model's own code on FakeTensors: sizes without data.

The memory of a step of a 70B model is known in seconds, on a machine that could not hold one layer of it. The
model is cut to one and to two blocks: the difference is what each further block keeps for the backward pass;
everything else is the same at any depth.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dpo.config import ModelConfig
from dpo.data.key_blocks import FLEX_BLOCK
from dpo.data.trees import Tree, TreeBatch, tree_batch
from dpo.model.lora import empty_policy
from dpo.model.projection import SLICE_ELEMENTS
from dpo.model.scorer import SequenceScorer
from dpo.planning.live_bytes import LiveBytes

ONE_KERNEL = "rehearsed_one_kernel"
"""Attention of a whole row by one kernel, like FlexAttention on GPUs: it keeps its inputs, its output and one
number per row and head."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """Bytes that are allocated and freed in the forward and backward pass of one micro-batch on one rank.

    Weights do not count. Gradients count until they are added to a buffer.
    """

    activations: int
    """Kept by all blocks of the model for the backward pass."""
    of_a_block: int
    """Kept by one block."""
    projection: int
    """In addition at the peak: the output projection, the backward pass of a block, its gradients."""
    operations: int
    """Number of operations, without views: what the host launches."""

    @property
    def peak(self) -> int:
        """Most bytes at the same time."""
        return self.activations + self.projection


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    """Live bytes at moments of a forward and backward pass."""

    in_blocks: int
    """After the last block."""
    saved: int
    """After the forward pass."""
    late: int
    """Peak until the end of the last block's backward pass: all blocks' activations are still live."""
    peak: int
    """Peak of the whole pass."""
    operations: int
    """Of the whole pass."""


def rehearse(
    config: PreTrainedConfig,
    model: ModelConfig,
    trees: Sequence[Tree],
    *,
    dtype: torch.dtype,
    autocast: bool = False,
    gpu: bool,
) -> Rehearsal:
    """The bytes of a pass over these trees in one micro-batch.

    Args:
        config: The model's configuration, at its full depth.
        model: Attention, tree layout and gradient checkpointing.
        trees: At least one.
        dtype: Type of the trained weights.
        autocast: Products are in bfloat16 and weights are not, as without DeepSpeed.
        gpu: With FlexAttention and a GPU's slices of the vocabulary; otherwise as on a CPU.
    """
    layers = int(config.get_text_config().num_hidden_layers)
    passes = [
        _rehearse_blocks(_cut(config, number), model, trees, dtype, autocast=autocast, gpu=gpu)
        for number in range(1, min(layers, 2) + 1)
    ]
    last = passes[-1]
    of_a_block = last.saved - passes[0].saved if layers > 1 else last.in_blocks
    more = max(0, layers - 2) * of_a_block
    activations = last.in_blocks + more
    return Rehearsal(
        activations=activations,
        of_a_block=of_a_block,
        projection=max(last.late + more, last.peak) - activations,
        operations=last.operations + max(0, layers - 2) * (last.operations - passes[0].operations),
    )


def _cut(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    shallow = deepcopy(config)
    text = shallow.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return shallow


def _rehearse_blocks(
    config: PreTrainedConfig,
    model: ModelConfig,
    trees: Sequence[Tree],
    dtype: torch.dtype,
    *,
    autocast: bool,
    gpu: bool,
) -> _Pass:
    with torch.device("meta"):
        bare = empty_policy(config, model, dtype=dtype)
    with FakeTensorMode() as fake:
        _to_fake(bare)
        if model.gradient_checkpointing:
            bare.activation_checkpointing_enable({"use_reentrant": False})
        bare.train()
        scorer = SequenceScorer(bare)
        layout = scorer.layout if model.share_prompts else "rows"
        if gpu:
            if scorer.projection is not None:
                scorer.projection.slice_elements = SLICE_ELEMENTS["cuda"]
            if layout == "packed" and model.attention in ("auto", "flex"):
                layout = "flex"
                scorer.packed_attention = ONE_KERNEL
        for parameter in filter(lambda parameter: parameter.requires_grad, bare.parameters()):
            parameter.register_post_accumulate_grad_hook(_forget_gradient)
        laid_out = tree_batch(trees, layout)
        batch = _without_data(laid_out, fake)
        known = [*bare.parameters(), *bare.buffers(), *_tensors(batch).values()]
        live = LiveBytes(known)
        moments: dict[str, int] = {}
        with _recorded(scorer, bare, live, moments), live:
            masks = _block_masks(laid_out, scorer.windows) if layout == "flex" else []
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logps = scorer(batch)
            saved = live.now
            logps.sum().backward()
        del masks
    in_blocks = moments.get("in_blocks", saved)
    return _Pass(
        in_blocks=in_blocks,
        saved=saved,
        late=moments.get("late", live.peak),
        peak=live.peak,
        operations=live.operations,
    )


@contextmanager
def _recorded(
    scorer: SequenceScorer, bare: PreTrainedModel, live: LiveBytes, moments: dict[str, int]
) -> Iterator[None]:
    """Records the live bytes after the last block, and the peak after its backward pass, in `moments`."""

    def before_last_block(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: moments.update(late=live.peak))

    def after_blocks(module: nn.Module, args: Any) -> None:
        moments["in_blocks"] = live.now

    blocks = next(module for module in bare.modules() if isinstance(module, nn.ModuleList))
    handles = [blocks[-1].register_forward_pre_hook(before_last_block, with_kwargs=True)]
    if scorer.projection is not None:
        handles.append(scorer.projection.register_forward_pre_hook(after_blocks))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forget_gradient(parameter: Tensor) -> None:
    """Like an engine that moves every gradient to a buffer at once."""
    parameter.grad = None


def _tensors(batch: TreeBatch) -> dict[str, Tensor]:
    return {f.name: v for f in fields(batch) if isinstance(v := getattr(batch, f.name), Tensor)}


def _to_fake(model: nn.Module) -> None:
    """Replaces a model's tensors by FakeTensors on the CPU; tied weights stay tied."""
    known: dict[Tensor, Any] = {}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False, remove_duplicate=False):
            if weight not in known:
                fake = torch.empty(weight.shape, dtype=weight.dtype)
                known[weight] = nn.Parameter(fake, requires_grad=weight.requires_grad)
            setattr(module, name, known[weight])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _without_data(batch: TreeBatch, fake: FakeTensorMode) -> TreeBatch:
    shapes: dict[str, Any] = {name: fake.from_tensor(tensor) for name, tensor in _tensors(batch).items()}
    return replace(batch, **shapes)


def _block_masks(batch: TreeBatch, windows: Sequence[int | None]) -> list[Tensor]:
    """The indices of FlexAttention's blocks, by queries and by keys, which live through the whole pass."""
    blocks = batch.input_ids.shape[1] // FLEX_BLOCK
    return [torch.empty(4, blocks, blocks + 1, dtype=torch.int32) for _ in {*windows}]


def _one_kernel(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    attended: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, None, scaling=scaling, is_causal=True
    )
    return attended


AttentionInterface.register(ONE_KERNEL, _one_kernel)
AttentionMaskInterface.register(ONE_KERNEL, sdpa_mask)
