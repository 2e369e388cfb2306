"""Memory of one rank, part by part, for every way of sharding a policy.

What is kept follows from the number of parameters and ranks; what comes and goes in a step is rehearsed. The
sizes of DeepSpeed's own buffers were found by counting storages (`benchmarks.scaling`), and a test holds the
sums to within a tenth of what real ranks allocate.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import nn

from dpo.engine.deepspeed_config import blocks_of, bucket_elements
from dpo.planning.rehearsal import Rehearsal

SINGLE = 4
"""Bytes of a float32: masters, moments, accumulated gradients."""
GATHERED_ELEMENTS = 1_000_000_000
"""Weights that ZeRO-3 keeps gathered at most (stage3_max_live_parameters), and those that it updates together
(sub_group_size): DeepSpeed's defaults."""
REDUCED_ELEMENTS = 500_000_000
"""Gradients that stage 0 sends together: DeepSpeed's reduce_bucket_size where ours has no say."""

Name = Literal["no DeepSpeed", "ZeRO-0", "ZeRO-2", "ZeRO-3", "ZeRO-3 offload"]
SHARDINGS: tuple[Name, ...] = ("no DeepSpeed", "ZeRO-0", "ZeRO-2", "ZeRO-3", "ZeRO-3 offload")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What of a model decides the memory of its training."""

    parameters: int
    trainable: int
    """Parameters that have a gradient."""
    block: int
    """Parameters of the largest of the model's repeated blocks."""
    trained_block: int
    """Those of them that have a gradient."""
    largest: int
    """Elements of the largest trainable parameter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank at the worst moment of a step."""

    weights: int
    """Its share of them, and those of others that it has gathered."""
    gradients: int
    optimizer: int
    """Moments, and float32 masters where there are any beside the weights."""
    activations: int
    projection: int
    """Output projection and backward pass of a block, or the update, whichever is more."""
    buckets: int
    """Where gradients wait for their journey."""
    host: int
    """In the host's memory instead."""

    @property
    def total(self) -> int:
        """All that is on the device."""
        kept = self.weights + self.gradients + self.optimizer
        return kept + self.activations + self.projection + self.buckets


def shape_of(model: nn.Module) -> Shape:
    """Counts the parameters of a model, which may be on the meta device."""
    trainable = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    return Shape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        trainable=sum(trainable),
        block=max(blocks_of(model), default=0),
        trained_block=max(blocks_of(model, trained=True), default=0),
        largest=max(trainable, default=0),
    )


def rank_memory(
    sharding: Name,
    shape: Shape,
    step: Rehearsal,
    *,
    world_size: int,
    dtype: torch.dtype,
    moments: int,
) -> Memory:
    """What one of `world_size` ranks needs; a step has several micro-batches.

    Args:
        sharding: How the policy is sharded.
        shape: Of the model.
        step: The rehearsed micro-batch, with weights as `sharding` keeps them (see `weight_dtype`).
        world_size: Number of ranks.
        dtype: The compute type.
        moments: Float32 numbers that the optimizer keeps for a parameter: 2 of AdamW, 1 of RMSprop.
    """
    full, width = shape.trainable, weight_dtype(sharding, dtype).itemsize
    held = width * full + dtype.itemsize * (shape.parameters - full)  # frozen weights have no masters
    part = -(-full // world_size)
    if sharding in ("no DeepSpeed", "ZeRO-0"):
        kept = _Kept(weights=held, gradients=SINGLE * full, optimizer=SINGLE * moments * full)
        if world_size == 1:
            return _worst(kept, step, _Passing(), update=0)
        if sharding == "no DeepSpeed":  # DDP's buckets are as large as the gradients, and always there
            return _worst(kept, step, _Passing(buckets=SINGLE * full), update=0)
        return _worst(kept, step, _Passing(), update=SINGLE * min(full, REDUCED_ELEMENTS))
    bucket = bucket_elements(shape.trained_block)
    freed = (
        step.of_a_block * bucket // max(1, shape.trained_block)
    )  # activations, when the first bucket is full
    owned = SINGLE * (1 + moments) * part
    if sharding == "ZeRO-2":
        kept = _Kept(weights=held, gradients=SINGLE * part, optimizer=owned)
        # Two buckets in turn; one that leaves is copied, in float32 where it is not.
        two, copies = 2 * width * bucket, (SINGLE + width) * bucket if width < SINGLE else 0
        if width == SINGLE:  # the last backward pass moves what was accumulated; on one rank, twice
            update = two + SINGLE * part * (2 if world_size == 1 else 1)
        else:  # the norm squares gradients one by one
            update = SINGLE * shape.largest
        return _worst(kept, step, _Passing(buckets=two + max(0, copies - freed)), update=update)
    passing = _Passing(
        gathered=width * min(shape.parameters, GATHERED_ELEMENTS) if world_size > 1 else 0,
        buckets=SINGLE * bucket + max(0, 2 * SINGLE * bucket - freed),
    )
    weights = width * -(-shape.parameters // world_size)
    if sharding == "ZeRO-3":
        kept = _Kept(weights=weights, gradients=SINGLE * part, optimizer=owned)
        update = SINGLE * (bucket + min(part, GATHERED_ELEMENTS))
        return _worst(kept, step, passing, update=update)
    kept = _Kept(weights=0, gradients=0, optimizer=0, host=weights + SINGLE * part + owned)
    return _worst(kept, step, passing, update=0)


def weight_dtype(sharding: Name, dtype: torch.dtype) -> torch.dtype:
    """Type in which the weights that are trained are kept: without DeepSpeed they are their own masters."""
    return torch.float32 if sharding == "no DeepSpeed" else dtype


def is_offered(sharding: Name, dtype: torch.dtype) -> bool:
    """Whether DeepSpeed does it: at stage 0 it does not sum bfloat16 gradients in float32."""
    return sharding != "ZeRO-0" or dtype == torch.float32


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """Bytes that are there all the time."""

    weights: int
    gradients: int
    optimizer: int
    host: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Passing:
    """Bytes that are there while a micro-batch is, besides its own."""

    gathered: int = 0
    buckets: int = 0


def _worst(kept: _Kept, step: Rehearsal, passing: _Passing, *, update: int) -> Memory:
    """The larger of two moments: a backward pass begins, or the weights are updated."""
    in_pass = passing.gathered + step.peak + passing.buckets >= update
    return Memory(
        weights=kept.weights + (passing.gathered if in_pass else 0),
        gradients=kept.gradients,
        optimizer=kept.optimizer,
        activations=step.activations if in_pass else 0,
        projection=step.projection if in_pass else update,
        buckets=passing.buckets if in_pass else 0,
        host=kept.host,
    )


def largest_fitting(points: Sequence[tuple[int, int]], room: int) -> int:
    """Most tokens of a micro-batch for which its bytes stay within `room`, on the line between points.

    Args:
        points: (tokens, bytes) in ascending order, at least two.
        room: Bytes.

    Returns:
        Tokens; 0 if not even the first point fits.
    """
    if points[0][1] > room:
        return 0
    for (left, low), (right, high) in pairwise(points):
        if high > room or right == points[-1][0]:
            return left + int((room - low) * (right - left) / max(1, high - low))
    raise AssertionError("unreachable")
