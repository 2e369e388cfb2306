"""A rank that dies, hangs, or computes numbers that are not finite."""

import time
from pathlib import Path

import pytest
from rig import KILL, Rig, at_step, checkpoints, metrics, weights

NAN = """
import os, torch
from dpo.train import loop
from dpo.train.preference_objective import PreferenceObjective
current, plain_step, plain_loss = [0], loop.train_step, PreferenceObjective.loss
def counted(session, *rest):
    current[0] = session.progress.step + 1
    return plain_step(session, *rest)
def broken(self, logps, batch, sums):
    loss = plain_loss(self, logps, batch, sums)
    here = os.environ.get("RANK", "0") == "{rank}" and current[0] in {steps}
    return {bad_value} if here else loss
loop.train_step, PreferenceObjective.loss = counted, broken
"""
BAD_LOSS = "loss * float('nan')"
BAD_GRADIENT = (
    "loss + (logps * 0.0).sqrt().sum()"  # adds 0 in the forward pass; not finite in the backward pass
)


@pytest.mark.fault(
    "kill -9 of one rank (or the kernel's out-of-memory killer)",
    "the others exit within seconds with status 1, and name it",
)
@pytest.mark.parametrize("rank", [1, 0])
def test_a_dead_rank_is_named(rig: Rig, rank: int) -> None:
    name = f"dead_{rank}"
    ended = rig.run(name, before=at_step(4, KILL, rank), seconds=60)
    assert not ended.hanging
    assert not ended.left
    assert f"rank {rank}" in ended.message
    assert "is gone: killed, or out of memory" in ended.message
    assert ended.status == 1
    assert 0 not in ended.statuses


@pytest.mark.fault(
    "one rank hangs for longer than train.stuck_after_seconds",
    "the run ends with status 1, names the rank, and writes the stacks of all threads",
)
def test_a_hung_rank_ends_the_run(rig: Rig) -> None:
    rig.completed("awake", "--train.max_steps", "1")  # builds DeepSpeed's extension, longer than the limit
    before = at_step(4, "time.sleep(600)", 1)
    ended = rig.run("asleep", "--train.stuck_after_seconds", "10", before=before, seconds=70)
    assert not ended.hanging
    assert not ended.left
    assert "no progress for" in ended.message
    assert "behind: rank 1" in ended.message
    stacks = (rig.folder / "asleep" / "stacks" / "rank_00001.txt").read_text()
    assert "in patched" in stacks
    assert "in train_step" in (rig.folder / "asleep" / "stacks" / "rank_00000.txt").read_text()
    assert 0 not in ended.statuses


@pytest.mark.fault(
    "one rank raises an exception",
    "the others exit too, and exit.json has its reason",
)
def test_an_error_on_one_rank_is_reported_by_all(rig: Rig) -> None:
    before = at_step(4, "raise ValueError('a broken row')", 1)
    ended = rig.run("error", before=before, seconds=60)
    assert not ended.hanging
    assert not ended.left
    assert ended.message == "rank 1: ValueError: a broken row"
    assert ended.status == 1


@pytest.mark.fault(
    "NaN in the loss or only in the gradient, on one rank; no DeepSpeed, ZeRO 0, 2 and 3",
    "all ranks skip the step together, count it and name the pairs; weights and optimizer unchanged",
)
@pytest.mark.parametrize(
    ("stage", "bad_value"),
    [
        *((stage, BAD_GRADIENT) for stage in (None, 0, 2, 3)),
        (2, BAD_LOSS),
        *(pytest.param(stage, BAD_LOSS, marks=pytest.mark.sweep) for stage in (None, 0, 3)),
    ],
    ids=lambda value: {BAD_LOSS: "loss", BAD_GRADIENT: "gradient"}.get(value, str(value)),
)
def test_a_non_finite_step_is_skipped(rig: Rig, stage: int | None, bad_value: str) -> None:
    world = {"world_size": 1 if stage is None else 2, "stage": stage}
    rank = 0 if stage is None else 1
    name = f"nan_{stage}_{bad_value == BAD_LOSS}"
    ended = rig.run(
        name,
        "--train.max_steps",
        "5",
        "--train.schedule",
        "constant",
        before=NAN.format(rank=rank, steps={5}, bad_value=bad_value),
        **world,
    )
    assert set(ended.statuses) == {0}, ended.output[-3000:]
    at = {line["step"]: line for line in metrics(rig.folder / name) if "train/epoch" in line}
    assert at[5]["train/skipped_steps"] == 1
    assert "train/grad_norm" not in at[5]
    assert "step 5 is skipped" in ended.output
    assert "data.train groups " in ended.output
    shorter = rig.completed(
        f"{name}_shorter", "--train.max_steps", "4", "--train.schedule", "constant", **world
    )
    assert weights(rig.folder / name) == weights(shorter)


@pytest.mark.fault(
    "NaN in consecutive steps",
    "the run stops after train.max_skipped_steps in a row with status 1; the last good checkpoint is intact",
)
def test_too_many_skipped_steps_end_the_run(rig: Rig) -> None:
    code = NAN.format(rank=1, steps=set(range(5, 13)), bad_value=BAD_LOSS)
    ended = rig.run("doomed", "--train.max_skipped_steps", "2", before=code)
    assert 0 not in ended.statuses
    assert ended.status == 1
    assert "3 steps in a row, up to step 7" in ended.message
    assert "train.max_skipped_steps" in ended.message
    assert "rank 1" in ended.message
    assert checkpoints(rig.folder / "doomed") == ["step_00000002", "step_00000004"]
    again = rig.run("doomed")  # without the NaNs
    assert set(again.statuses) == {0}, again.output[-3000:]


@pytest.mark.fault(
    "a run with a skipped step, killed and resumed",
    "the same bytes as without the kill",
)
def test_a_skipped_step_is_skipped_again_after_a_resume(rig: Rig) -> None:
    code = NAN.format(rank=1, steps={5}, bad_value=BAD_LOSS)
    straight = rig.completed("skips", before=code)
    rig.run("skips_killed", before=code + at_step(7, KILL, 0, 1))
    resumed = rig.completed("skips_killed", before=code)
    assert metrics(resumed) == metrics(straight)
    assert weights(resumed) == weights(straight)


IN_C = """
import ctypes
def fail():
    raise ValueError('a broken row')
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def never_return():  # a mutex that is locked twice: no signal ends the wait, and Python is not asked
    mutex = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


@pytest.mark.fault(
    "a rank is killed, or fails, while another is in a C call that no signal ends (as NCCL's are)",
    "within seconds status 1 with the name of the dead rank, or the reason of the failed one, and stacks",
)
@pytest.mark.parametrize(
    ("action", "said"),
    [
        ("die", "is gone: killed, or out of memory"),
        pytest.param("fail", "ValueError: a broken row", marks=pytest.mark.sweep),
    ],
)
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.sweep)])
def test_a_rank_in_a_c_call_ends_after_another(rig: Rig, action: str, said: str, rank: int) -> None:
    name = f"in_c_{rank}_{action}"
    before = IN_C + at_step(4, f'{action}() if os.environ["RANK"] == "{rank}" else never_return()', 0, 1)
    ranks = rig.start(name, before=before)
    ranks.steps(3)
    began = time.monotonic()
    ended = ranks.end(60)
    assert time.monotonic() - began < 25
    assert not ended.hanging
    assert not ended.left
    assert ended.status == 1
    assert f"rank {rank}" in ended.message or (rank == 0 and action == "fail")  # its own record
    assert said in ended.message
    stacks = (rig.folder / name / "stacks" / f"rank_{1 - rank:05d}.txt").read_text()
    assert "in never_return" in stacks


BEFORE = """
import os, time
from dpo import alive
import {module} as module
plain = module.{name}
def patched(*arguments, **named):
    if os.environ["RANK"] == "{rank}":
        {action}
    return plain(*arguments, **named)
module.{name} = patched
"""


def before_call(place: str, rank: int, action: str) -> str:
    """Code that runs `action` on a rank before each call of a function."""
    module, _, name = place.rpartition(".")
    return BEFORE.format(module=module, name=name, rank=rank, action=action)


@pytest.mark.fault(
    "a rank hangs while it opens data or loads a model, in train, precompute-ref or evaluate",
    "the run ends after train.stuck_after_seconds with status 1, and names the rank",
)
@pytest.mark.parametrize(
    ("command", "place", "rank"),
    [
        pytest.param("train", "dpo.commands.inputs.open_datasets", 0, marks=pytest.mark.sweep),
        pytest.param("train", "dpo.commands.train.load_policy", 1, marks=pytest.mark.sweep),
        ("precompute-ref", "dpo.reference.precompute.frozen_scorer", 1),
        pytest.param("evaluate", "dpo.commands.evaluate.frozen_scorer", 1, marks=pytest.mark.sweep),
    ],
)
def test_a_hang_before_the_first_step_ends(
    rig: Rig, whole: Path, command: str, place: str, rank: int
) -> None:
    name = "whole" if command == "evaluate" else f"hang_{command}_{rank}"
    empty = (
        ("--reference.cache_dir", str(rig.folder / f"{name}_cache")) if command == "precompute-ref" else ()
    )
    limit = ("--train.stuck_after_seconds", "4", "--evaluate.num_prompts", "0")
    before = before_call(place, rank, "time.sleep(600)")
    ended = rig.run(name, *empty, *limit, command=command, before=before, seconds=70)
    assert not ended.hanging
    assert not ended.left
    assert ended.status == 1
    assert "no progress for" in ended.message
    assert f"behind: rank {rank} (" in ended.message
    assert ", rank" not in ended.message


@pytest.mark.fault(
    "rank 0 tokenizes for longer than train.stuck_after_seconds, while the others wait",
    "the run continues: every piece of work is a sign of life",
)
@pytest.mark.sweep
def test_slow_tokenizing_is_no_hang(rig: Rig) -> None:
    slowly = "[(time.sleep(0.1), alive.advanced()) for _ in range(80)]"
    before = before_call("dpo.commands.inputs.open_datasets", 0, slowly)
    rig.completed("slow", "--train.stuck_after_seconds", "4", "--train.max_steps", "1", before=before)
