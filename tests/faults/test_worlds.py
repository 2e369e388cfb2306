"""Resuming on a different number of ranks, and engines that cannot resume each other's state."""

from pathlib import Path

import pytest
from rig import KILL, OFFLOAD, Rig, at_step, metrics, weights

CLOSE = {"rel": 5e-5, "abs": 1e-6}


def curves(run_dir: Path) -> list[tuple[float, float, float]]:
    return [
        (line["train/loss"], line["train/grad_norm"], line["train/learning_rate"])
        for line in metrics(run_dir)
        if "train/loss" in line
    ]


@pytest.mark.fault(
    "a different number of ranks, 2 -> 1 -> 2, ZeRO-2 and ZeRO-3",
    "converted to the universal format; loss, gradient norm and pairs continue to float tolerance",
)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_then_one_then_two(rig: Rig, stage: int) -> None:
    name = f"worlds_{stage}"
    decay = ("--train.weight_decay", "0.1")  # of matrices only: gives two parameter groups
    straight = rig.completed(f"straight_{stage}", *decay, stage=stage)
    rig.run(name, *decay, before=at_step(5, KILL, 0, 1), stage=stage)
    second = rig.run(name, *decay, before=at_step(9, KILL, 0), stage=stage, world_size=1)
    assert "after step 4" in second.output, second.output[-3000:]
    third = rig.run(name, *decay, stage=stage, world_size=2)
    assert set(third.statuses) == {0}, third.output[-3000:]
    assert "after step 8" in third.output
    run_dir = rig.folder / name
    assert not list((run_dir / "checkpoints").glob(".*"))
    for ours, theirs in zip(curves(run_dir), curves(straight), strict=True):
        assert ours == pytest.approx(theirs, **CLOSE)
    assert metrics(run_dir)[-1]["eval/loss"] == pytest.approx(metrics(straight)[-1]["eval/loss"], **CLOSE)


@pytest.mark.fault(
    "one process without DeepSpeed, resumed as DDP on two ranks, and back",
    "the state is not sharded: no conversion",
)
def test_ddp_and_one_process_resume_each_other(rig: Rig, whole: Path) -> None:
    rig.run("plain", before=at_step(5, KILL, 0), stage=None, world_size=1)
    rig.run("plain", before=at_step(9, KILL, 0, 1), stage=None, world_size=2)
    ended = rig.run("plain", stage=None, world_size=1)
    assert set(ended.statuses) == {0}, ended.output[-3000:]
    for ours, theirs in zip(curves(rig.folder / "plain"), curves(whole), strict=True):
        assert ours == pytest.approx(theirs, **CLOSE)


@pytest.mark.fault(
    "a different ZeRO stage, or DeepSpeed's state without DeepSpeed",
    "status 2 and a one-line message that says what to do",
)
@pytest.mark.parametrize("stage", [3, None])
def test_a_different_engine_is_refused(rig: Rig, stage: int | None) -> None:
    if not (rig.folder / "of_zero_2").exists():
        rig.run("of_zero_2", before=at_step(3, KILL, 0, 1))
    ended = rig.run("of_zero_2", stage=stage, world_size=2)
    assert set(ended.statuses) == {2}, ended.output[-3000:]
    assert "written with DeepSpeed ZeRO-2" in ended.output


@pytest.mark.fault(
    "RMSprop with a configuration that offloads the optimizer",
    "status 2: Accelerate would silently use Adam",
)
def test_an_optimizer_that_cannot_be_offloaded_is_refused(rig: Rig) -> None:
    ended = rig.run("offloaded", "--train.optimizer", "rmsprop", stage=OFFLOAD)
    assert set(ended.statuses) == {2}, ended.output[-3000:]
    assert "train.optimizer: rmsprop" in ended.output


@pytest.mark.fault(
    "optimizer and weights on the host, killed and resumed",
    "the same metrics and bytes",
)
def test_an_offloaded_run_resumes(rig: Rig) -> None:
    straight = rig.completed("offload_straight", stage=OFFLOAD)
    rig.run("offload", before=at_step(3, KILL, 0, 1), stage=OFFLOAD)
    # whichever step has the newest checkpoint by then
    rig.run("offload", "--train.checkpoint_async", "true", before=at_step(7, KILL, 0, 1), stage=OFFLOAD)
    resumed = rig.completed("offload", stage=OFFLOAD)
    assert metrics(resumed) == metrics(straight)
    assert weights(resumed) == weights(straight)
    other = rig.run("offload", "--train.num_epochs", "2", stage=3)
    assert set(other.statuses) == {2}
    assert "written with DeepSpeed ZeRO-3, optimizer on the host" in other.output
