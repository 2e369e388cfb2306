"""Two machines simulated on one: network namespaces with their own addresses, started by launch/nodes."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rig import ROOT, SLOWLY, STEPS, Rig, make_rig, metrics, wait_for

from dpo.reference.store import ReferenceStore


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Rig:
    name = f"dpo-test-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"network namespaces are not permitted on this machine ({made.stderr.strip()})")
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return make_rig(tmp_path_factory.mktemp("two_nodes"), tiny_model)


def start(rig: Rig, command: str, *more: str, before: str = "") -> subprocess.Popen[str]:
    (rig.folder / "sitecustomize.py").write_text(
        f"import os\nif 'RANK' in os.environ:\n    exec({before!r}, {{}})\n"
    )
    python_path = f"{rig.folder}:{ROOT}"
    return subprocess.Popen(
        [
            str(ROOT / "launch" / "two_namespaces"),
            command,
            "--config",
            str(rig.folder / "config.yaml"),
            *more,
        ],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": python_path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def namespace(number: int) -> str:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return next(line.split()[0] for line in listed.splitlines() if line.split()[0].endswith(f"-{number}"))


def test_precompute_on_two_machines_fills_the_same_cache(rig: Rig, tmp_path: Path) -> None:
    process = start(
        rig, "precompute-ref", "--run_dir", str(tmp_path / "run"), "--reference.cache_dir", str(tmp_path)
    )
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    caches = [next(folder.glob("*/identity.json")).parent for folder in (tmp_path, rig.folder / "reference")]
    two, one = (ReferenceStore.at(folder).load() for folder in caches)
    assert np.array_equal(two.index.keys, one.index.keys)
    assert np.array_equal(two.logps, one.logps)


def test_a_dead_machine_is_named_and_one_rank_resumes(rig: Rig) -> None:
    straight = metrics(rig.completed("straight", world_size=1))
    run_dir = rig.folder / "two"
    process = start(rig, "train", "--run_dir", str(run_dir), before=SLOWLY)
    try:
        wait_for(lambda: len(metrics(run_dir)) >= 6, 90, "5 steps on two machines")
        pids = subprocess.run(
            ["ip", "netns", "pids", namespace(2)], capture_output=True, text=True, check=True
        )
        for pid in pids.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        output, _ = process.communicate(timeout=90)
    finally:
        process.terminate()
    assert process.returncode == 1, output[-3000:]
    assert re.search(r"stopped with status 1: rank 1 \(.*is gone: killed, or out of memory", output), output[
        -3000:
    ]
    assert re.search(r"machine 1 \(10\.77\.\d+\.2\) ended with status", output)
    alone = rig.run("two", world_size=1)
    assert set(alone.statuses) == {0}, alone.output[-3000:]
    assert "resuming after step " in alone.output
    found = metrics(run_dir)
    assert found[-1]["step"] == STEPS
    for ours, theirs in zip(found, straight, strict=True):
        for name in ("train/loss", "train/grad_norm", "eval/loss"):
            assert ours.get(name) == (pytest.approx(theirs[name], rel=1e-4) if name in theirs else None)
