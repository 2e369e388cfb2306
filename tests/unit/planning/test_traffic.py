"""Messages of a rank by hand; tests/distributed compares them with DeepSpeed's own count."""

import pytest
import torch

from dpo.planning.memory import Name, Shape
from dpo.planning.traffic import sent, traffic

SHAPE = Shape(parameters=1000, trainable=1000, block=100, trained_block=100, largest=100, module=100)
BIG = Shape(
    parameters=4 * 10**9, trainable=4 * 10**9, block=10**8, trained_block=10**8, largest=10**8, module=10**8
)


@pytest.mark.parametrize(
    ("sharding", "expected"),
    [
        ("ZeRO-0", {"all_reduce": 4000}),
        ("ZeRO-2", {"all_reduce": 12000, "all_gather_into_tensor": 1000}),
        ("ZeRO-3", {"all_gather_into_tensor": 3000, "reduce_scatter_tensor": 12000}),
    ],
)
def test_messages_by_hand(sharding: Name, expected: dict[str, float]) -> None:
    found = traffic(sharding, SHAPE, world_size=4, dtype=torch.float32, micro_batches=3)
    assert found == expected


def test_weights_that_do_not_stay_gathered_are_gathered_twice() -> None:
    found = traffic("ZeRO-3", BIG, world_size=4, dtype=torch.bfloat16, micro_batches=1)
    assert found["all_gather_into_tensor"] == pytest.approx(2 * 10**9 * 1.75)


def test_passes_without_gradient_gather_weights_under_zero_3_alone() -> None:
    for sharding, more in (("ZeRO-2", 0), ("ZeRO-3", 2 * 1000)):
        options = {"world_size": 4, "dtype": torch.float32, "micro_batches": 3}
        direct, cached = traffic(sharding, SHAPE, **options), traffic(sharding, SHAPE, **options, scored=2)
        gathered = "all_gather_into_tensor"
        assert cached[gathered] - direct[gathered] == more
        assert {**cached, gathered: 0} == {**direct, gathered: 0}


def test_one_rank_sends_nothing() -> None:
    assert traffic("ZeRO-3", SHAPE, world_size=1, dtype=torch.float32, micro_batches=2) == {}


def test_bytes_sent_by_rings() -> None:
    messages = {"all_reduce": 100.0, "reduce_scatter_tensor": 100.0, "all_gather_into_tensor": 25.0}
    assert sent(messages, 4) == 150 + 75 + 75
