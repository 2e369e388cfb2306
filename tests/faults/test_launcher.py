"""A launcher that dies while its ranks start or train, and numbers of its own that the experiment owns."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from rig import KILL, SLOWLY, Rig, metrics, wait_for, weights

INLINE = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_GRADIENT_CLIPPING": "0.01",
    "ACCELERATE_MIXED_PRECISION": "bf16",
}


@pytest.mark.fault(
    "the launcher names accumulation, clipping and precision",
    "the experiment's are used, to the last bit; the others are named",
)
def test_the_launchers_numbers_change_nothing(rig: Rig, whole: Path) -> None:
    ended = rig.run("inline", stage=None, variables=INLINE)
    assert set(ended.statuses) == {0}, ended.output[-3000:]
    for key in ("gradient_accumulation_steps: 4", "gradient_clipping: 0.01", "mixed_precision: bf16"):
        assert f"{key} is not used" in ended.output
    assert metrics(rig.folder / "inline") == metrics(whole)
    assert weights(rig.folder / "inline") == weights(whole)


@pytest.mark.fault(
    "kill -9 of the launcher",
    "the kernel signals the ranks: they save and exit",
)
def test_no_rank_outlives_the_launcher(rig: Rig) -> None:
    ranks = rig.start("orphans", before=SLOWLY, launcher=True)
    ranks.steps(2)
    pids = [ranks.pid(rank) for rank in (0, 1)]
    parent = int(subprocess.check_output(["ps", "-o", "ppid=", "-p", str(pids[0])], text=True))
    os.kill(parent, signal.SIGKILL)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 30, "the ranks to exit")
    assert ranks.end(30).status == 3


@pytest.mark.fault(
    "kill -9 of the launcher while its ranks start",
    "no rank is left waiting; the same command starts again",
)
@pytest.mark.parametrize(
    "seconds", [0.0, *(pytest.param(n, marks=pytest.mark.sweep) for n in (0.3, 1.0, 2.0, 3.0, 4.0))]
)
def test_no_rank_outlives_a_launcher_that_dies_at_once(rig: Rig, whole: Path, seconds: float) -> None:
    ranks = rig.start(f"early_{seconds}", launcher=True)
    pids = [ranks.pid(rank) for rank in (0, 1)]
    parent = int(subprocess.check_output(["ps", "-o", "ppid=", "-p", str(pids[0])], text=True))
    time.sleep(seconds)
    os.kill(parent, signal.SIGKILL)
    ended = ranks.end(20)
    assert not ended.hanging
    assert not ended.left
    assert ended.statuses != [0]
    again = rig.completed(f"early_{seconds}")
    assert metrics(again) == metrics(whole)
    assert weights(again) == weights(whole)


@pytest.mark.fault(
    "kill -9 of launch/run itself; a signal to every process at once",
    "the ranks save and end; launch/run, if it is there, ends after them with status 3",
)
@pytest.mark.parametrize("way", ["kill launch/run", "signal all"])
def test_launch_run_and_its_ranks_end_together(rig: Rig, whole: Path, way: str) -> None:
    name = way.replace("/", " ").replace(" ", "_")
    ranks = rig.start(name, before=SLOWLY, launcher=True)
    ranks.steps(2)
    pids = [ranks.pid(rank) for rank in (0, 1)]
    above = _ancestors(pids[0], ranks.processes[0].pid)
    assert len(above) == 3  # the launcher, its supervisor, launch/run
    if way == "signal all":
        for pid in (*above, *pids):
            os.kill(pid, signal.SIGTERM)
    else:
        os.kill(above[-1], signal.SIGKILL)
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids + above[:-1]), 40, "all ended")
    ended = ranks.end(40)
    assert not ended.left
    assert ended.status == 3
    assert "a checkpoint of step" in ended.message
    assert ended.statuses == ([3] if way == "signal all" else [-9])
    again = rig.completed(name)
    assert metrics(again) == metrics(whole)
    assert weights(again) == weights(whole)


def _ancestors(pid: int, last: int) -> list[int]:
    """The processes above one, up to `last`."""
    found: list[int] = []
    while not found or found[-1] != last:
        parent = subprocess.check_output(["ps", "-o", "ppid=", "-p", str((found or [pid])[-1])], text=True)
        found.append(int(parent))
    return found


LOADING = """
import os, signal, time
from dpo.commands import train as commands
from dpo.reference import precompute
def patched(*arguments, **named):
    if os.environ["RANK"] == "1":
        {action}
    time.sleep(60)
commands.load_policy = precompute.frozen_scorer = patched
"""


@pytest.mark.fault(
    "a rank is killed, or fails, while all of them load",
    "status 1 with its name or its reason, although the launcher sends the others a SIGTERM",
)
@pytest.mark.parametrize(
    ("command", "action", "said"),
    [
        ("train", KILL, "is gone: killed, or out of memory"),
        ("train", "raise ValueError('a broken file')", "ValueError: a broken file"),
        pytest.param("precompute-ref", KILL, "is gone: killed, or out of memory", marks=pytest.mark.sweep),
    ],
)
def test_a_rank_that_dies_while_loading_is_no_preemption(
    rig: Rig, command: str, action: str, said: str
) -> None:
    name = f"loading_{command}_{action == KILL}"
    empty = (
        ("--reference.cache_dir", str(rig.folder / f"{name}_cache")) if command == "precompute-ref" else ()
    )
    before = LOADING.format(action=action)
    ended = rig.run(name, *empty, command=command, before=before, seconds=90, launcher=True)
    assert ended.statuses == [1], ended.output[-3000:]
    assert ended.status == 1
    assert "rank 1" in ended.message
    assert said in ended.message
    assert not ended.left
