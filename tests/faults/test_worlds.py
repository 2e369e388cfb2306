"""Going on with another number of ranks, and what cannot be gone on with."""

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
    "another number of ranks, 2 -> 1 -> 2, ZeRO-2 and ZeRO-3",
    "made universal on the way; loss, gradient norm and pairs go on to float tolerance",
)
@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_then_one_then_two(rig: Rig, stage: int) -> None:
    name, decay = (
        f"worlds_{stage}",
        ("--train.weight_decay", "0.1"),
    )  # of matrices only: two groups of parameters
    straight = rig.completed(f"straight_{stage}", *decay, stage=stage)
    rig.run(name, *decay, before=at_step(5, KILL, 0, 1), stage=stage)
    second = rig.run(name, *decay, before=at_step(9, KILL, 0), stage=stage, world_size=1)
    assert "resuming after step 4" in second.said, second.said[-3000:]
    third = rig.run(name, *decay, stage=stage, world_size=2)
    assert set(third.statuses) == {0}, third.said[-3000:]
    assert "resuming after step 8" in third.said
    run_dir = rig.folder / name
    assert not list((run_dir / "checkpoints").glob(".*"))
    for ours, theirs in zip(curves(run_dir), curves(straight), strict=True):
        assert ours == pytest.approx(theirs, **CLOSE)
    assert metrics(run_dir)[-1]["eval/loss"] == pytest.approx(metrics(straight)[-1]["eval/loss"], **CLOSE)


@pytest.mark.fault(
    "one process without DeepSpeed goes on as DDP on two ranks, and back", "the state is whole: no conversion"
)
def test_ddp_and_one_process_read_each_other(rig: Rig, whole: Path) -> None:
    rig.run("plain", before=at_step(5, KILL, 0), stage=None, world_size=1)
    rig.run("plain", before=at_step(9, KILL, 0, 1), stage=None, world_size=2)
    ended = rig.run("plain", stage=None, world_size=1)
    assert set(ended.statuses) == {0}, ended.said[-3000:]
    for ours, theirs in zip(curves(rig.folder / "plain"), curves(whole), strict=True):
        assert ours == pytest.approx(theirs, **CLOSE)


@pytest.mark.fault(
    "another ZeRO stage, or DeepSpeed's state without DeepSpeed",
    "refused in one line that says what to do, status 2",
)
@pytest.mark.parametrize("stage", [3, None])
def test_another_engine_is_refused(rig: Rig, stage: int | None) -> None:
    if not (rig.folder / "of_zero_2").exists():
        rig.run("of_zero_2", before=at_step(3, KILL, 0, 1))
    ended = rig.run("of_zero_2", stage=stage, world_size=2)
    assert set(ended.statuses) == {2}, ended.said[-3000:]
    assert "written with DeepSpeed ZeRO-2" in ended.said
    assert "start it with the same engine" in ended.said


@pytest.mark.fault(
    "RMSprop with a configuration that offloads the optimizer",
    "refused, status 2: Accelerate would take Adam without a word",
)
def test_an_optimizer_that_cannot_be_offloaded_is_refused(rig: Rig) -> None:
    ended = rig.run("offloaded", "--train.optimizer", "rmsprop", stage=OFFLOAD)
    assert set(ended.statuses) == {2}, ended.said[-3000:]
    assert "train.optimizer: rmsprop" in ended.said


@pytest.mark.fault("optimizer and weights on the host, killed and resumed", "the same metrics and bytes")
def test_an_offloaded_run_goes_on(rig: Rig) -> None:
    straight = rig.completed("offload_straight", stage=OFFLOAD)
    rig.run("offload", before=at_step(5, KILL, 0, 1), stage=OFFLOAD)
    resumed = rig.completed("offload", stage=OFFLOAD)
    assert metrics(resumed) == metrics(straight)
    assert weights(resumed) == weights(straight)
    other = rig.run("offload", "--train.num_epochs", "2", stage=3)
    assert set(other.statuses) == {2}
    assert "written with DeepSpeed ZeRO-3, optimizer on the host" in other.said
