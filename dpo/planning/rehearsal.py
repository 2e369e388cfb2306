"""Rehearses a training step without memory: the model's own code on FakeTensors: sizes without data.

The memory of a step of a 70B model is known in seconds, on a machine that could not hold one layer of it. The
model is cut to one block of each kind, and one more of a kind: the difference is what each further block of
that kind keeps for the backward pass; everything else is the same at any depth.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedConfig, PreTrainedModel

from dpo.config import ModelConfig
from dpo.data.key_blocks import FLEX_BLOCK
from dpo.data.trees import Layout, Tree, TreeBatch, tree_batch
from dpo.errors import UserError
from dpo.model.files import first_line
from dpo.model.lora import empty_policy
from dpo.model.offload import offload
from dpo.model.recomputation import recompute
from dpo.model.scorer import SequenceScorer
from dpo.planning.cut import Blocks
from dpo.planning.live_bytes import LiveBytes
from dpo.planning.stand_ins import ONE_KERNEL, Dropped, TwoKernels, experts_of_any_dtype, quantize


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
    offloaded: int = 0
    """Kept in the host's memory for the backward pass."""

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
    offloaded: int
    """To the host."""


def rehearse(
    config: PreTrainedConfig,
    model: ModelConfig,
    trees: Sequence[Tree],
    *,
    dtype: torch.dtype,
    gpu: bool,
) -> Rehearsal:
    """The bytes of a pass over these trees in one micro-batch.

    Args:
        config: The model's configuration, at its full depth.
        model: Attention, tree layout and gradient checkpointing.
        trees: At least one.
        dtype: The compute type.
        gpu: With FlexAttention and a GPU's slices of the vocabulary; otherwise as on a CPU.

    Raises:
        UserError: The model's code needs values, not only sizes.
    """
    return rehearse_with(policy_blocks(config, model, dtype), model, trees, gpu=gpu)


def policy_blocks(config: PreTrainedConfig, model: ModelConfig, dtype: torch.dtype) -> Blocks:
    """The policy's blocks on the meta device, for any number of rehearsals; arguments as for `rehearse`."""
    with torch.device("meta"):
        return Blocks(empty_policy(config, model, dtype=dtype))


def rehearse_with(blocks: Blocks, model: ModelConfig, trees: Sequence[Tree], *, gpu: bool) -> Rehearsal:
    """`rehearse` with blocks that are there already, and are not changed."""
    run = partial(_in_a_layout, blocks, model, trees, gpu=gpu)
    firsts = [kind[0] for kind in blocks.kinds]
    most = max(blocks.kinds, key=len)
    base = run(firsts)
    if len(most) == 1:
        last, of_kinds = base, [base.in_blocks // len(firsts)] * len(firsts)
        more = operations = offloaded = 0
    else:
        doubled = [run(sorted([*firsts, kind[1]])) if len(kind) > 1 else base for kind in blocks.kinds]
        last = doubled[blocks.kinds.index(most)]
        of_kinds = [each.saved - base.saved for each in doubled]
        counts = [len(kind) - 1 - (kind is most) for kind in blocks.kinds]
        more = sum(count * bytes_ for count, bytes_ in zip(counts, of_kinds, strict=True))
        operations = sum(
            count * (each.operations - base.operations) for count, each in zip(counts, doubled, strict=True)
        )
        offloaded = sum(
            count * (each.offloaded - base.offloaded) for count, each in zip(counts, doubled, strict=True)
        )
    activations = last.in_blocks + more
    return Rehearsal(
        activations=activations,
        of_a_block=of_kinds[blocks.last] or max(of_kinds),
        projection=max(last.late + more, last.peak) - activations,
        operations=last.operations + operations,
        offloaded=last.offloaded + offloaded,
    )


def _in_a_layout(
    blocks: Blocks,
    model: ModelConfig,
    trees: Sequence[Tree],
    numbers: Sequence[int],
    *,
    gpu: bool,
) -> _Pass:
    """A pass through these blocks in the first layout that the model can be called with."""
    layouts: list[Layout] = ["rows"]
    if model.share_prompts and not blocks.recur:
        layouts = SequenceScorer(blocks.keeping(numbers)).layouts
    problem: Exception | None = None
    for layout in layouts:
        try:
            return _rehearse_blocks(blocks.keeping(numbers), model, trees, layout, gpu=gpu)
        except Exception as error:  # a model's code may raise anything for inputs that it does not expect
            problem = error
    assert problem is not None
    raise UserError(
        f"model.name_or_path: a step of {blocks.name} cannot be rehearsed without memory "
        f"({type(problem).__name__}: {first_line(problem)}), so nothing is planned; train a few steps with "
        "train.max_steps and look at perf/peak_memory_gb"
    ) from problem


def _rehearse_blocks(
    bare: PreTrainedModel,
    model: ModelConfig,
    trees: Sequence[Tree],
    layout: Layout,
    *,
    gpu: bool,
) -> _Pass:
    with FakeTensorMode() as fake:
        _to_fake(bare)
        if model.quantization is not None:
            quantize(bare, model.quantization)
        recompute(bare, model.gradient_checkpointing)
        offloading = Dropped(bare)
        if model.offload_activations:
            offload(bare, offloading)
        bare.train()
        scorer = SequenceScorer(bare)
        if gpu:
            if scorer.projection is not None:
                scorer.projection.device_type, scorer.projection.kernels = "cuda", TwoKernels()
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
        with experts_of_any_dtype(), _recorded(scorer, bare, live, moments), live:
            masks = _block_masks(laid_out, scorer.windows) if layout == "flex" else []
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
        offloaded=offloading.bytes,
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
