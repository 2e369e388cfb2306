"""Law 5: a run that is killed anywhere and resumed ends bit for bit like an uninterrupted one."""

from pathlib import Path

import pytest
from rig import KILL, STEPS, Ended, Rig, at_step, checkpoints, metrics, weights

KILL_IN_SAVE = """
import os, signal, threading, time
from dpo.train import loop
plain = loop.begin_checkpoint
def patched(engine, progress, *rest, **named):
    if progress.step == 6:
        threading.Timer({delay}, os.kill, (os.getpid(), signal.SIGKILL)).start()
        plain(engine, progress, *rest, **named)
        time.sleep(60)
    return plain(engine, progress, *rest, **named)
loop.begin_checkpoint = patched
"""
REPRESENTATIVE = (2, 5, 8)


def assert_same(run_dir: Path, whole: Path) -> None:
    """Metrics, weights and checkpoints equal those of the uninterrupted run."""
    assert metrics(run_dir) == metrics(whole)
    assert weights(run_dir) == weights(whole)
    assert checkpoints(run_dir) == checkpoints(whole)


BACKGROUND = ("--train.checkpoint_async", "true")
"""A checkpoint may be lost that is still being written: the one before it counts."""


def resumed(rig: Rig, name: str, *more: str) -> Ended:
    """Starts the same command again; it must succeed."""
    ended = rig.run(name, *more)
    assert set(ended.statuses) == {0}, ended.output[-4000:]
    return ended


@pytest.mark.fault(
    "kill -9 of all ranks, at each of 12 steps",
    "after resuming, the same metrics and bytes",
)
@pytest.mark.parametrize(
    "step",
    [
        step if step in REPRESENTATIVE else pytest.param(step, marks=pytest.mark.sweep)
        for step in range(1, STEPS + 1)
    ],
)
def test_killed_before_a_step_and_resumed(rig: Rig, whole: Path, step: int) -> None:
    name = f"killed_{step}"
    ended = rig.run(name, *BACKGROUND, before=at_step(step, KILL, 0, 1))
    assert 0 not in ended.statuses
    assert not ended.hanging
    assert not ended.left
    resumed(rig, name)
    assert_same(rig.folder / name, whole)


@pytest.mark.fault(
    "kill -9 while a checkpoint is written, at 10 moments",
    "the previous checkpoint is valid, and the final result is the same",
)
@pytest.mark.parametrize(
    "milliseconds",
    [0, 12, 40, *(pytest.param(delay, marks=pytest.mark.sweep) for delay in (3, 6, 9, 16, 22, 30, 60))],
)
def test_killed_while_a_checkpoint_is_written(rig: Rig, whole: Path, milliseconds: int) -> None:
    name = f"killed_saving_{milliseconds}"
    ended = rig.run(name, *BACKGROUND, before=KILL_IN_SAVE.format(delay=milliseconds / 1000))
    assert 0 not in ended.statuses
    assert not ended.left
    assert "step_00000004" in checkpoints(rig.folder / name)
    resumed(rig, name)
    assert_same(rig.folder / name, whole)


KILL_IN_FIRST = """
import os, signal
from dpo.train import checkpoint, manifest
plain = {module}.{name}
def patched(path, *rest, **named):
    if "{of}" in path.name:
        (path.parent / ".checkpoint.key.0.writing").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(path, *rest, **named)
{module}.{name} = patched
"""


@pytest.mark.fault(
    "kill -9 in the first checkpoint's rename, while its manifest or the key is written",
    "no checkpoint was finished: the same command starts again, and ends the same",
)
@pytest.mark.parametrize(
    ("module", "name", "of"),
    [
        ("checkpoint", "publish_folder", "step_"),
        pytest.param("manifest", "write_file", "manifest", marks=pytest.mark.sweep),
        ("manifest", "write_file", "checkpoint.key"),
    ],
)
def test_killed_in_the_first_checkpoint(rig: Rig, whole: Path, module: str, name: str, of: str) -> None:
    run = f"killed_first_{of.strip('_')}"
    ended = rig.run(run, before=KILL_IN_FIRST.format(module=module, name=name, of=of))
    assert 0 not in ended.statuses
    assert not ended.left
    resumed(rig, run)
    assert_same(rig.folder / run, whole)


@pytest.mark.fault(
    "resume where no checkpoint was written",
    "status 2: the run never starts over",
)
def test_a_run_without_checkpoints_does_not_start_over(rig: Rig) -> None:
    ended = rig.run("none", "--train.checkpoint_every", "0", before=at_step(3, KILL, 0, 1))
    assert 0 not in ended.statuses
    again = rig.run("none", "--train.checkpoint_every", "0")
    assert set(again.statuses) == {2}
    assert "run_dir: " in again.output
    assert "records 2 steps" in again.output
    assert "Traceback" not in again.output
