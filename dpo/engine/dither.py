"""Float32 masters of bfloat16 weights that start between bfloat16 values, instead of on them.

A policy in bfloat16 starts from weights that are bfloat16 values, and a weight shows nothing of its master's
updates until the master has gone half a spacing, 0.2 to 0.4 % of the weight: with a learning rate of 2e-5,
weights of 0.1 wait for 12 steps. A master that starts at random within that half, uniformly, rounds to the
same weight, so the policy is still the reference; but then an update moves the weight with a probability in
proportion to it, from the first step on, as dither does in signal processing.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dpo.engine.masters import FLOAT32, Masters
from dpo.random_bits import at_once, random_bits, shifted, stream_key

HALF_SPACING = 2**15
"""Of bfloat16 values, which are the upper halves of float32's bits, in steps of float32."""


def dither(masters: Tensor, key: int, start: int = 0) -> None:
    """Moves bfloat16 values at random, uniformly among what rounds to the same value; zeros stay.

    Args:
        masters: (N,) contiguous float32. Changed in place.
        key: Of the random stream of the weight that they are a part of.
        start: Index of the first in that weight, flattened: each part gets what it gets in the whole.
    """
    keys = torch.tensor([key], dtype=torch.int64, device=masters.device)
    for part in masters.split(at_once(masters.device)):
        drawn = shifted(random_bits(keys, start, len(part))[0], 48)
        steps = (drawn - HALF_SPACING).clamp_(min=1 - HALF_SPACING)  # at a whole half rounding may leave
        part.view(torch.int32).add_(torch.where(part == 0, 0, steps).int())
        start += len(part)


@torch.no_grad()
def dither_replicas(masters: Masters, module: nn.Module, seed: int) -> None:
    """Dithers masters that every rank has whole.

    Args:
        masters: Of the weights of `module`; float32 weights, their own masters, are left as they are.
        module: Names the weights.
        seed: Of the draw, with the name of a weight.
    """
    for name, weight in module.named_parameters():
        if (master := masters.of.get(weight, weight)) is not weight:
            dither(master.view(-1), stream_key(seed, name))


@torch.no_grad()
def dither_shards(module: nn.Module, seed: int) -> None:
    """Dithers this rank's part of the masters of DeepSpeed, where DeepSpeed keeps it.

    Args:
        module: Prepared by DeepSpeed; weights in float32 are left as they are.
        seed: As for `dither_replicas`; each master gets what it gets there.
    """
    named = {name: w for name, w in module.named_parameters() if w.requires_grad and w.itemsize < FLOAT32}
    _dither_at_stage_3({name: weight for name, weight in named.items() if hasattr(weight, "ds_id")}, seed)
    for name, weight in named.items():
        shard: Any = getattr(weight, "_hp_mapping", None)  # None where another rank has the whole
        if shard is not None:
            dither(shard.hp_fragment, stream_key(seed, name), shard.lp_fragment_address.start)


def _dither_at_stage_3(named: Mapping[str, Any], seed: int) -> None:
    """As DeepSpeed's `safe_set_local_fp32_param`, which reads a whole group for each weight from a disk."""
    groups = dict[int, list[tuple[str, int, int]]]()
    for name, weight in named.items():
        group, offset, number = weight._z3_optimizer.grad_position[weight._z3_optimizer.get_param_id(weight)]
        groups.setdefault(group, []).append((name, offset, number))
    for group, members in groups.items():
        optimizer = named[members[0][0]]._z3_optimizer
        on_disk = optimizer._swappable_optimizer_subgroup(group)
        if on_disk:
            optimizer._optimizer_states_and_gradient_swap_in(group)
        for name, offset, number in members:
            shard = optimizer.fp32_partitioned_groups_flat[group].narrow(0, offset, number)
            first = optimizer._get_param_partition_rank(named[name]) * number
            dither(shard, stream_key(seed, name), first)
        if on_disk:
            optimizer._optimizer_states_and_gradient_swap_out(group)
