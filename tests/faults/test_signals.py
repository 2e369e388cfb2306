"""Signals: all ranks save at the next step and exit with status 3, and the same command resumes."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from rig import RUN, SLOWLY, STEPS, Rig, at_step, metrics, wait_for, weights

from dpo.guards.signals import REPEATS_WITHIN_SECONDS

EARLY = """
import os, signal
from dpo.commands import train as commands
plain = commands.load_policy
def patched(*arguments, **named):
    os.kill(os.getpid(), signal.SIGTERM)
    return plain(*arguments, **named)
commands.load_policy = patched
"""
WAIT = "open(os.environ['PIDS'] + '/../reached', 'w').close(); time.sleep(60)"

TERMINAL = """
import os, pty, signal, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], sys.argv[1:])
signal.signal(signal.SIGTERM, lambda *_: os.write(terminal, bytes([3])))
try:
    while output := os.read(terminal, 4096):
        os.write(1, output)
except OSError:  # closed
    pass
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
"""Runs a command in the foreground of a pseudo-terminal; a SIGTERM to this script types Ctrl-C there."""


@pytest.mark.fault(
    "SIGTERM, SIGUSR1 or SIGINT to one rank",
    "all ranks save at the next step and exit with status 3; after resuming, the final result is the same",
)
@pytest.mark.parametrize(
    ("rank", "number"),
    [
        (0, signal.SIGTERM),
        (1, signal.SIGUSR1),
        pytest.param(1, signal.SIGTERM, marks=pytest.mark.sweep),
        pytest.param(0, signal.SIGINT, marks=pytest.mark.sweep),
    ],
)
def test_a_signal_to_one_rank_stops_all_ranks(
    rig: Rig, whole: Path, rank: int, number: signal.Signals
) -> None:
    name = f"signalled_{rank}_{number.name}"
    ranks = rig.start(name, before=SLOWLY)
    ranks.steps(3)
    os.kill(ranks.pid(rank), number)
    ended = ranks.end(40)
    assert set(ended.statuses) == {3}, ended.output[-3000:]
    assert ended.status == 3
    assert "a checkpoint of step" in ended.message
    assert not ended.left
    stopped_at = metrics(rig.folder / name)[-1]["step"]
    assert 2 <= stopped_at < STEPS
    again = rig.run(name)
    assert set(again.statuses) == {0}
    assert f"after step {stopped_at}" in again.output
    assert metrics(rig.folder / name) == metrics(whole)
    assert weights(rig.folder / name) == weights(whole)


@pytest.mark.fault(
    "a second signal, seconds after the first",
    "exits at once with status 1; earlier checkpoints are valid",
)
def test_a_second_signal_exits_at_once(rig: Rig) -> None:
    ranks = rig.start("impatient", before=at_step(4, WAIT, 0, 1))
    reached = ranks.folder / "reached"
    wait_for(reached.is_file, 60, "step 4")
    for _ in range(2):
        for rank in (0, 1):
            os.kill(ranks.pid(rank), signal.SIGTERM)
        time.sleep(REPEATS_WITHIN_SECONDS + 0.5)
    ended = ranks.end(10)
    assert not ended.left
    assert 0 not in ended.statuses
    assert 3 not in ended.statuses
    again = rig.run("impatient")
    assert set(again.statuses) == {0}, again.output[-3000:]


@pytest.mark.fault(
    "SIGTERM before the first step (loading, tokenizing)",
    "status 3; the same command starts again",
)
def test_a_signal_before_the_first_step(rig: Rig) -> None:
    ended = rig.run("early", before=EARLY)
    assert set(ended.statuses) == {3}, ended.output[-3000:]
    assert "before the first step" in ended.message
    assert set(rig.run("early", "--train.max_steps", "1").statuses) == {0}


@pytest.mark.fault(
    "SIGTERM to launch/run (a scheduler), Ctrl-C in its terminal",
    "forwarded once: all ranks save and exit together with status 3",
)
@pytest.mark.parametrize("way", ["SIGTERM", pytest.param("Ctrl-C", marks=pytest.mark.sweep)])
def test_a_signal_to_the_launcher(rig: Rig, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "Ctrl-C":
        monkeypatch.setattr("rig.RUN", [sys.executable, "-c", TERMINAL, *RUN])
    ranks = rig.start(f"launched_{way}", before=SLOWLY, launcher=True)
    ranks.steps(3)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    ended = ranks.end(40)
    assert ended.statuses == [3], ended.output[-3000:]
    assert not ended.left
    assert "stopped with status 3: a checkpoint of step" in ended.output.strip().splitlines()[-1]
    assert way != "Ctrl-C" or "SIGINT: saving" in ended.output
