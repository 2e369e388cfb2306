"""The advice of a plan: requested micro-batches first, then smaller ones, sharding and recomputation.

The memory of a micro-batch is replaced by a linear function of its tokens, so that every decision is known.
"""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from dpo.config import ModelConfig, TrainConfig
from dpo.planning import fit as module
from dpo.planning.data_sample import SampledData
from dpo.planning.fit import USABLE, Advice, Fit, Machine
from dpo.planning.memory import Memory, Name, Shape
from dpo.planning.rehearsal import Rehearsal

SHAPE = Shape(parameters=1, trainable=1, block=1, trained_block=1, largest=1, module=1)
KEPT: dict[Name, int] = {"no DeepSpeed": 500, "ZeRO-2": 300, "ZeRO-3": 100, "ZeRO-3 offload": 0}
"""Bytes that each sharding keeps here; a token adds 1 byte, 1/2 if activations are
recomputed but those of attention, 1/10 if all are."""


@pytest.fixture(autouse=True)
def linear_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def rehearse(_: Any, model: ModelConfig, tokens: int, **__: Any) -> Rehearsal:
        shares = {False: 1, "selective": 2, "full": 10, True: 10}
        activations = tokens // shares[model.gradient_checkpointing]
        return Rehearsal(activations=activations, of_a_block=0, projection=0, operations=7)

    def rank_memory(sharding: Name, _: Shape, step: Rehearsal, **__: Any) -> Memory:
        nothing = {"gradients": 0, "optimizer": 0, "projection": 0, "buckets": 0, "host": 0}
        return Memory(weights=KEPT[sharding], activations=step.activations, **nothing)

    monkeypatch.setattr(module, "policy_blocks", lambda *_: cast(Any, "blocks"))
    monkeypatch.setattr(module, "rehearse_with", rehearse)
    monkeypatch.setattr(module, "rank_memory", rank_memory)
    monkeypatch.setattr(module, "ROUNDED", 1)


def fit(
    room: int,
    *,
    gpus: int = 8,
    requested: int = 1000,
    longest: int = 10,
    optimizer: Any = "adamw",
    cached: bool = False,
    most_tokens: int = 10**9,
    **model: Any,
) -> Fit:
    """A policy on GPUs with `room` usable bytes; the longest sequence is a tenth of the longest group."""
    sizes = {"longest": longest, "longest_sequence": longest // 10}
    data = cast(
        SampledData, SimpleNamespace(**sizes, trees=lambda tokens: tokens, piece=lambda tokens: tokens)
    )
    return Fit(
        ModelConfig(name_or_path="m", **model),
        TrainConfig(max_tokens_per_micro_batch=requested, optimizer=optimizer),
        cast(Any, None),
        SHAPE,
        data,
        Machine(num_gpus=gpus, gpu_memory=-int(-room // USABLE), gpu_flops=1.0, mfu=0.5),
        state_bytes=8,
        cached=cached,
        most_tokens=most_tokens,
    )


def test_a_micro_batch_is_no_larger_than_a_ranks_part_of_a_step() -> None:
    assert fit(1400, requested=1000, most_tokens=300).requested == 300
    assert fit(1400, requested=1000, most_tokens=3000).requested == 1000
    assert fit(1400, requested=1000, longest=400, most_tokens=300).requested == 400


def chosen(advice: Advice) -> tuple[Name | None, int, Any]:
    return advice.sharding, advice.max_tokens_per_micro_batch, advice.gradient_checkpointing


@pytest.mark.parametrize(
    ("room", "expected"),
    [
        (1400, ("ZeRO-2", 1000, False)),
        (1200, ("ZeRO-3", 1000, False)),
        (1050, ("ZeRO-3 offload", 1000, False)),
        (700, ("ZeRO-2", 400, False)),  # smaller micro-batches before recomputation
        (240, ("ZeRO-3", 280, "selective")),
        (110, ("ZeRO-3 offload", 1000, "full")),
        (60, ("ZeRO-3 offload", 600, "full")),
        (0, (None, 1000, "full")),
    ],
)
def test_less_memory_changes_the_advice_in_this_order(
    room: int, expected: tuple[Name | None, int, Any]
) -> None:
    sharding, tokens, checkpointing = chosen(fit(room).advice())
    assert (sharding, checkpointing) == (expected[0], expected[2])
    assert tokens == pytest.approx(expected[1], rel=0.05)


def test_recomputation_that_is_configured_is_kept() -> None:
    for kind, said in ((True, "full"), ("full", "full"), ("selective", "selective")):
        assert chosen(fit(1400, gradient_checkpointing=kind).advice()) == ("ZeRO-2", 1000, said)


def test_activations_are_recomputed_but_those_of_attention_where_that_is_enough() -> None:
    advice = fit(700, gpus=1, optimizer="adafactor").advice()  # which cannot be offloaded
    assert chosen(advice) == ("no DeepSpeed", 400, "selective")
    assert "but those of attention are recomputed" in advice.reason
    assert "ZeRO-3" in {way.sharding for way in fit(700).ways(recomputed="selective")}


def test_one_gpu_trains_without_deepspeed() -> None:
    assert fit(2000, gpus=1).advice().launcher == "launch/one_process.yaml"
    names = [way.sharding for way in fit(2000, gpus=1).ways(recomputed=False)]
    assert names == ["no DeepSpeed", "ZeRO-2", "ZeRO-3", "ZeRO-3 offload"]
    assert "no DeepSpeed" not in [way.sharding for way in fit(2000).ways(recomputed=False)]


def test_more_gpus_than_a_node_has_need_the_launcher_for_several_nodes() -> None:
    assert fit(1400, gpus=8).advice().launcher == "launch/one_node.yaml"
    assert fit(1400, gpus=16).advice().launcher == "launch/multi_node.yaml"


def test_the_reason_names_what_does_not_fit() -> None:
    assert "ZeRO-2 would need" in fit(1200).advice().reason
    assert "recomputed" in fit(240).advice().reason


def test_a_micro_batch_holds_at_least_the_longest_group() -> None:
    assert fit(9000, requested=100, longest=5000).requested == 5000


def test_an_optimizer_that_cannot_be_sharded_is_whole_on_every_gpu() -> None:
    found = fit(2000, optimizer="muon").advice()
    assert (found.sharding, found.launcher) == ("no DeepSpeed", "launch/one_node_ddp.yaml")
    assert fit(2000, gpus=16, optimizer="muon").advice().launcher == "launch/multi_node_ddp.yaml"
    assert fit(2000, gpus=1, optimizer="muon").advice().launcher == "launch/one_process.yaml"
    assert fit(400, optimizer="muon").advice().sharding is None
    for optimizer, names in (("lion", {"ZeRO-2", "ZeRO-3"}), ("muon", {"no DeepSpeed"})):
        assert {way.sharding for way in fit(2000, optimizer=optimizer).ways(recomputed=False)} == names


def test_a_cached_gradient_needs_room_for_one_completion_instead_of_a_group() -> None:
    large = {"requested": 100, "longest": 5000}
    assert fit(400, **large).advice().sharding is None
    found = fit(400, **large, cached=True).advice()
    assert (found.sharding, found.cached, found.gradient_checkpointing) == ("ZeRO-3", True, "selective")
    assert found.max_tokens_per_micro_batch >= 500
    assert "not even one completion" in fit(20, **large, cached=True).advice().reason
