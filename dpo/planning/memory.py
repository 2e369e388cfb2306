"""Memory of one rank, part by part, for every sharding of a policy.

What stays in memory follows from the number of parameters and ranks; what comes and goes in a step is
rehearsed (`rehearsal`). The sizes of DeepSpeed's own buffers were found by counting storages
(`benchmarks.scaling`), and a test compares the sums with what real ranks allocate: they agree within 10 %.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from transformers import PreTrainedModel

from dpo.engine.deepspeed_model import blocks_of, bucket_elements
from dpo.model.quantized import packed_bytes, packed_weights
from dpo.planning.rehearsal import Rehearsal

FLOAT32 = 4
"""Bytes of a float32: masters, moments, accumulated gradients."""
GATHERED_ELEMENTS = 1_000_000_000
"""Most weights that ZeRO-3 keeps gathered (stage3_max_live_parameters), and that it updates together
(sub_group_size): DeepSpeed's defaults."""
REDUCED_ELEMENTS = 500_000_000
"""Gradients that stage 0 reduces together: DeepSpeed's default of reduce_bucket_size, which stage 0 uses
regardless of our setting."""

Name = Literal["no DeepSpeed", "ZeRO-0", "ZeRO-2", "ZeRO-3", "ZeRO-3 offload"]
SHARDINGS: tuple[Name, ...] = ("no DeepSpeed", "ZeRO-0", "ZeRO-2", "ZeRO-3", "ZeRO-3 offload")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a model that its training memory depends on."""

    parameters: int
    trainable: int
    """Parameters with a gradient."""
    block: int
    """Parameters of the largest of the model's repeated blocks."""
    trained_block: int
    """Those of them with a gradient."""
    largest: int
    """Elements of the largest trainable parameter."""
    module: int
    """Parameters of the module that has most of its own, such as the experts of a block."""
    packed: int = 0
    """Frozen parameters that are quantized."""
    packed_bytes: int = 0
    """What these take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank at the peak of a step."""

    weights: int
    """The rank's share of the weights, and gathered weights of other ranks."""
    gradients: int
    optimizer: int
    """Its state, and float32 masters if they are separate from the weights."""
    activations: int
    projection: int
    """Output projection and backward pass of a block, or the update, whichever is larger."""
    buckets: int
    """Gradients that wait to be sent, or to be added."""
    host: int
    """Bytes in the host's memory instead."""

    @property
    def total(self) -> int:
        """All bytes on the device."""
        kept = self.weights + self.gradients + self.optimizer
        return kept + self.activations + self.projection + self.buckets


def shape_of(model: PreTrainedModel, *, quantization: str | None = None) -> Shape:
    """Counts the parameters of a model, which may be on the meta device.

    Args:
        model: With all weights in full.
        quantization: How training will have its frozen linear layers; None: in full.
    """
    weights = packed_weights(model) if quantization is not None else []
    trainable = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable=sum(trainable),
        block=max(blocks_of(model), default=0),
        trained_block=max(blocks_of(model, trained=True), default=0),
        largest=max(trainable, default=0),
        module=max(sum(p.numel() for p in each.parameters(recurse=False)) for each in model.modules()),
        packed=sum(weight.numel() for weight in weights),
        packed_bytes=int(sum(packed_bytes(weight, quantization or "") for weight in weights)),
    )


def is_offered(sharding: Name, dtype: torch.dtype) -> bool:
    """Whether DeepSpeed supports it: at stage 0 it does not sum bfloat16 gradients in float32."""
    return sharding != "ZeRO-0" or dtype == torch.float32


def rank_memory(
    sharding: Name,
    shape: Shape,
    step: Rehearsal,
    *,
    world_size: int,
    dtype: torch.dtype,
    state_bytes: float,
) -> Memory:
    """What one of `world_size` ranks needs in a step of several micro-batches.

    Args:
        sharding: How the policy is sharded.
        shape: Of the model.
        step: The rehearsed micro-batch.
        world_size: Number of ranks.
        dtype: The compute type.
        state_bytes: Bytes that the optimizer keeps per trained parameter: 8 for AdamW, 4 for RMSprop.
    """
    rank = _Rank(
        shape=shape,
        step=step,
        world_size=world_size,
        width=dtype.itemsize,
        state_bytes=state_bytes,
    )
    return _BY_SHARDING[sharding](rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rank:
    """The inputs of every sharding's memory."""

    shape: Shape
    step: Rehearsal
    world_size: int
    width: int
    """Bytes of a weight."""
    state_bytes: float

    @property
    def all_weights(self) -> int:
        """Bytes of the whole model."""
        shape = self.shape
        return self.width * (shape.parameters - shape.packed) + shape.packed_bytes

    @property
    def part(self) -> int:
        """Trained parameters of one rank if they are divided among the ranks."""
        return -(-self.shape.trainable // self.world_size)

    @property
    def part_states(self) -> int:
        """Bytes of that part's masters and optimizer state."""
        return round((FLOAT32 + self.state_bytes) * self.part)

    @property
    def bucket(self) -> int:
        """Elements of a gradient bucket in ZeRO-2 and ZeRO-3."""
        return bucket_elements(self.shape.trained_block)

    @property
    def freed(self) -> int:
        """Bytes of activations that are free again when the first bucket is full."""
        return self.step.of_a_block * self.bucket // max(1, self.shape.trained_block)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """Bytes that are allocated all the time."""

    weights: int
    gradients: int
    optimizer: int
    host: int = 0


def _no_deepspeed(rank: _Rank) -> Memory:
    """Everything on every rank; gradients are sent as they are kept."""
    return _peak(_unsharded(rank), rank.step)


def _zero_0(rank: _Rank) -> Memory:
    """Everything on every rank; with several ranks, the update reduces gradients in one large bucket."""
    reduced = FLOAT32 * min(rank.shape.trainable, REDUCED_ELEMENTS) if rank.world_size > 1 else 0
    return _peak(_unsharded(rank), rank.step, update=reduced)


def _zero_2(rank: _Rank) -> Memory:
    """All weights on every rank; gradients and optimizer are sharded."""
    kept = _Kept(weights=rank.all_weights, gradients=FLOAT32 * rank.part, optimizer=rank.part_states)
    two_buckets = 2 * rank.width * rank.bucket  # filled in turn
    if rank.width == FLOAT32:
        # The last pass has its own gradients beside the accumulated ones: on the last rank, from its start.
        copies = max(0, FLOAT32 * rank.part - rank.freed)
        return _peak(kept, rank.step, buckets=two_buckets + copies)
    # A bucket that is sent is copied, and converted to float32.
    copies = max(0, (FLOAT32 + rank.width) * rank.bucket - rank.freed)
    # The norm squares the gradients one by one.
    return _peak(kept, rank.step, buckets=two_buckets + copies, update=FLOAT32 * rank.shape.largest)


def _zero_3(rank: _Rank) -> Memory:
    """Weights, gradients and optimizer are sharded; the update joins the gradients of a sub-group."""
    kept = _Kept(weights=_own_weights(rank), gradients=FLOAT32 * rank.part, optimizer=rank.part_states)
    update = FLOAT32 * (rank.bucket + min(rank.part, GATHERED_ELEMENTS))
    return _peak(kept, rank.step, gathered=_gathered(rank), buckets=_zero_3_buckets(rank), update=update)


def _zero_3_offload(rank: _Rank) -> Memory:
    """The same shards in the host's memory; the device only has what a micro-batch needs."""
    on_host = _own_weights(rank) + FLOAT32 * rank.part + rank.part_states
    kept = _Kept(weights=0, gradients=0, optimizer=0, host=on_host)
    return _peak(kept, rank.step, gathered=_gathered(rank), buckets=_zero_3_buckets(rank))


_BY_SHARDING: dict[Name, Callable[[_Rank], Memory]] = {
    "no DeepSpeed": _no_deepspeed,
    "ZeRO-0": _zero_0,
    "ZeRO-2": _zero_2,
    "ZeRO-3": _zero_3,
    "ZeRO-3 offload": _zero_3_offload,
}


def _unsharded(rank: _Rank) -> _Kept:
    trained = rank.shape.trainable
    masters = 0 if rank.width == FLOAT32 else FLOAT32  # weights in float32 are their own
    return _Kept(
        weights=rank.all_weights,
        gradients=FLOAT32 * trained,
        optimizer=round((masters + rank.state_bytes) * trained),
    )


def _own_weights(rank: _Rank) -> int:
    """Bytes of a rank's share of all weights."""
    return rank.width * -(-rank.shape.parameters // rank.world_size)


def _gathered(rank: _Rank) -> int:
    """Bytes of weights of other ranks that ZeRO-3 holds in a pass: a module's always, however many."""
    if rank.world_size == 1:
        return 0
    return rank.width * min(rank.shape.parameters, max(GATHERED_ELEMENTS, rank.shape.module))


def _zero_3_buckets(rank: _Rank) -> int:
    """Bytes of ZeRO-3's bucket, and of its copies as far as they need more than what is free again."""
    return FLOAT32 * rank.bucket + max(0, 2 * FLOAT32 * rank.bucket - rank.freed)


def _peak(kept: _Kept, step: Rehearsal, *, gathered: int = 0, buckets: int = 0, update: int = 0) -> Memory:
    """The larger of two moments: the start of the backward pass, or the update of the weights.

    Args:
        kept: Allocated at both.
        step: A micro-batch, for the first moment.
        gathered: Weights of other ranks, at the first moment.
        buckets: Gradient buckets, at the first moment.
        update: Bytes of the second moment.
    """
    in_pass = gathered + step.peak + buckets >= update
    return Memory(
        weights=kept.weights + (gathered if in_pass else 0),
        gradients=kept.gradients,
        optimizer=kept.optimizer,
        activations=step.activations if in_pass else 0,
        projection=step.projection if in_pass else update,
        buckets=buckets if in_pass else 0,
        host=kept.host + step.offloaded,
    )


def largest_fitting(points: Sequence[tuple[int, int]], room: int) -> int:
    """Most tokens of a micro-batch whose bytes stay within `room`, interpolated linearly between points.

    Args:
        points: (tokens, bytes) in ascending order, at least two; the last line is extended.
        room: Bytes.

    Returns:
        Tokens; 0 if even the first point does not fit.
    """
    if points[0][1] > room:
        return 0
    for (left, low), (right, high) in pairwise(points):
        if high > room or right == points[-1][0]:
            return left + int((room - low) * (right - left) / max(1, high - low))
    raise AssertionError("unreachable")
