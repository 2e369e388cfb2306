"""Laws 4 and 5 for every optimizer: the same steps on one rank, under DDP and under ZeRO, resumed or not.

What an optimizer cannot do under ZeRO is refused. In bfloat16, too, all engines compute the same function and
have float32 masters. Two ranks start twice: without DeepSpeed, and with it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from optimizer_ranks import DTYPES, STEPS, Dtype, digests_of_masters, measure, on_ranks
from ranks import free_port, rank_environment, start_rank, wait
from rig import OFFLOAD, deepspeed_variables

from dpo.engine.optimizer import OPTIMIZERS

PAGES_ON_A_GPU = "ignore:Paged optimizers are not supported on CPU:UserWarning"
SHARDED = ("adamw", "rmsprop", "lion")
ALLOWED = {"ZeRO-2": SHARDED, "ZeRO-3": SHARDED, "DDP": tuple(OPTIMIZERS), "offloaded": ("adamw",)}
Measured = dict[str, Any]
"""Compute type -> optimizer -> what `measure` found."""
WITHIN = {"float32": 1e-4, "bfloat16": 0.02}
"""Relative: ranks score other rows together, which rounds bfloat16 otherwise."""


def started(folder: Path, model: Path, stages: list[int | None]) -> list[Measured]:
    """What two ranks measured under these ZeRO stages, one after the other."""
    folder.mkdir()
    environments, port, processes = [deepspeed_variables(folder, stage) for stage in stages], free_port(), []
    for rank in range(2):
        mine = [{**rank_environment(rank, 2, port), **environment} for environment in environments]
        processes.append(start_rank(on_ranks, mine, model, folder))
    assert wait(processes, 480) == [0, 0]  # the first to offload compiles an Adam
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(len(stages))]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> dict[str, Measured]:
    folder = tmp_path_factory.mktemp("optimizers")
    (ddp,) = started(folder / "ddp", tiny_model, [None])
    two, three, offloaded = started(folder / "zero", tiny_model, [2, 3, OFFLOAD])
    return {"DDP": ddp, "ZeRO-2": two, "ZeRO-3": three, "offloaded": offloaded}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Measured:
    folder = tmp_path_factory.mktemp("alone")
    return {dtype: measure(tiny_model, folder / dtype, dtype) for dtype in DTYPES}


@pytest.mark.filterwarnings(PAGES_ON_A_GPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sharding", "name"), [(where, name) for where in ALLOWED for name in ALLOWED[where]]
)
def test_ranks_and_sharding_change_no_step(
    measured: dict[str, Measured], alone: Measured, sharding: str, name: str, dtype: Dtype
) -> None:
    found, expected = measured[sharding][dtype][name]["straight"], alone[dtype][name]["straight"]
    assert len(expected) == STEPS
    assert expected[-1][0] < expected[0][0] - 0.01  # it learns
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, rel=WITHIN[dtype])


@pytest.mark.parametrize("name", SHARDED)
def test_in_bfloat16_our_masters_take_the_steps_of_zeros(measured: dict[str, Measured], name: str) -> None:
    """With the same rows on each rank only the order of float32 sums differs."""
    ours, zeros = (measured[where]["bfloat16"][name]["straight"] for where in ("DDP", "ZeRO-2"))
    assert ours[0] == pytest.approx(zeros[0], rel=1e-6)
    for found, expected in zip(ours, zeros, strict=True):
        assert found == pytest.approx(expected, rel=1e-3)


def test_dithered_masters_are_the_same_bits_however_they_are_sharded(
    measured: dict[str, Measured], tiny_model: Path
) -> None:
    alone = digests_of_masters(tiny_model)
    assert {where: found["masters"] for where, found in measured.items()} == dict.fromkeys(ALLOWED, alone)


@pytest.mark.filterwarnings(PAGES_ON_A_GPU)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_takes_the_same_steps(
    measured: dict[str, Measured], alone: Measured, name: str, dtype: Dtype
) -> None:
    for where in [alone, *(measured[sharding] for sharding in ALLOWED if name in ALLOWED[sharding])]:
        assert where[dtype][name]["resumed"] == where[dtype][name]["straight"]


def test_the_optimizers_differ(alone: Measured) -> None:
    same_arithmetic = {"paged_adamw", "paged_adamw_8bit"}  # as adamw and adamw_8bit
    steps = alone["float32"]
    last = {
        name: round(steps[name]["straight"][-1][0], 6) for name in OPTIMIZERS if name not in same_arithmetic
    }
    assert len(set(last.values())) == len(last), last


@pytest.mark.parametrize("sharding", ["ZeRO-2", "ZeRO-3"])
def test_what_zero_cannot_shard_is_refused(measured: dict[str, Measured], sharding: str) -> None:
    refused = {name: said for name, said in measured[sharding]["float32"].items() if isinstance(said, str)}
    assert refused.keys() == OPTIMIZERS.keys() - set(SHARDED)
    for name, said in refused.items():
        assert said.startswith(f"train.optimizer: {name}; it ")
        assert f"DeepSpeed {sharding} cannot take it" in said
