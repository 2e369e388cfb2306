"""Memory of a rank by hand, for each sharding; tests/distributed compares it with real ranks."""

from dataclasses import replace

import pytest
import torch

from dpo.planning.memory import SHARDINGS, Memory, Name, Shape, is_offered, largest_fitting, rank_memory
from dpo.planning.rehearsal import Rehearsal

BILLION = 1_000_000_000
SHAPE = Shape(
    parameters=8 * BILLION,
    trainable=8 * BILLION,
    block=218_000_000,
    trained_block=218_000_000,
    largest=525_000_000,
    module=525_000_000,
)
STEP = Rehearsal(activations=10 * BILLION, of_a_block=300_000_000, projection=2 * BILLION, operations=0)
WITHOUT = Rehearsal(activations=0, of_a_block=0, projection=0, operations=0)


def of(sharding: Name, world_size: int, step: Rehearsal = STEP, shape: Shape = SHAPE) -> Memory:
    return rank_memory(sharding, shape, step, world_size=world_size, dtype=torch.bfloat16, state_bytes=8)


def test_zero2_by_hand() -> None:
    found = of("ZeRO-2", 8)
    assert found.weights == 16 * BILLION
    assert found.gradients == 4 * BILLION
    assert found.optimizer == 12 * BILLION
    assert (found.activations, found.projection, found.host) == (10 * BILLION, 2 * BILLION, 0)
    assert found.total == 44 * BILLION + found.buckets


def test_zero3_has_its_share_and_the_gathered_weights() -> None:
    found = of("ZeRO-3", 8)
    assert found.weights == 2 * BILLION + 2 * BILLION, "a share of bfloat16, and a billion gathered"
    assert found.optimizer == 12 * BILLION
    assert of("ZeRO-3", 1).weights == 16 * BILLION, "one rank does not gather"


def test_offload_moves_the_shards_to_the_host() -> None:
    found = of("ZeRO-3 offload", 8)
    assert (found.gradients, found.optimizer, found.weights) == (0, 0, 2 * BILLION)
    assert found.host == 18 * BILLION


@pytest.mark.parametrize("sharding", ["ZeRO-2", "ZeRO-3", "ZeRO-3 offload"])
def test_more_ranks_never_need_more_memory_per_rank(sharding: Name) -> None:
    totals = [of(sharding, ranks).total + of(sharding, ranks).host for ranks in (2, 4, 16, 64, 1024)]
    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_frozen_weights_need_neither_gradients_nor_moments(sharding: Name) -> None:
    frozen = replace(SHAPE, trainable=SHAPE.trainable // 100, largest=100_000)
    found, full = of(sharding, 2, shape=frozen), of(sharding, 2)
    assert found.gradients * 99 <= full.gradients
    assert found.optimizer * 99 <= full.optimizer
    assert found.total + found.host < full.total + full.host


def test_zero_3_gathers_the_experts_of_a_block_however_many_they_are() -> None:
    large = replace(SHAPE, parameters=100 * BILLION, trainable=100 * BILLION)
    experts = replace(large, module=11 * BILLION)
    assert of("ZeRO-3", 8, shape=experts).weights - of("ZeRO-3", 8, shape=large).weights == 2 * 10 * BILLION


def test_without_activations_the_update_is_the_peak() -> None:
    found = of("ZeRO-3", 2, step=WITHOUT)
    assert found.projection > 4 * BILLION * 0.99, "the gradients of a sub-group are joined"
    assert found.activations == found.buckets == 0


def test_stage_0_is_offered_in_float32_only() -> None:
    assert is_offered("ZeRO-0", torch.float32)
    assert not is_offered("ZeRO-0", torch.bfloat16)
    assert is_offered("ZeRO-2", torch.bfloat16)


@pytest.mark.parametrize(
    ("room", "tokens"), [(99, 0), (100, 10), (150, 15), (200, 20), (400, 30), (600, 40), (800, 50)]
)
def test_the_largest_micro_batch_is_interpolated_between_points(room: int, tokens: int) -> None:
    assert largest_fitting([(10, 100), (20, 200), (40, 600)], room) == tokens
