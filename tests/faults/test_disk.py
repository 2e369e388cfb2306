"""Disks that are full, too small, or read-only."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rig import Rig, checkpoints, metrics, weights


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"mounting a small disk needs more privileges ({mounted.stderr.strip()})")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True)


FILL = """
import os
from dpo.train import loop
plain = loop.begin_checkpoint
def patched(engine, progress, folder, *rest, **named):
    if progress.step == 6 and os.environ.get("RANK", "0") == "0":
        with open(folder.path / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                file.truncate(file.tell() - {left})
    return plain(engine, progress, folder, *rest, **named)
loop.begin_checkpoint = patched
"""


@pytest.mark.fault(
    "the disk fills up during a save",
    "status 2; the previous checkpoint is valid; with free space, the final result is the same",
)
@pytest.mark.parametrize("left", [0, 65536, 300_000])
def test_the_disk_fills_up_during_a_save(rig: Rig, whole: Path, small_disk: Path, left: int) -> None:
    ended = rig.run(
        "run", "--train.stuck_after_seconds", "6", before=FILL.format(left=left), place=small_disk, seconds=40
    )
    run_dir = small_disk / "run"
    assert not ended.hanging
    assert set(ended.statuses) == {2}, ended.output[-3000:]
    assert "a checkpoint could not be written (rank" in ended.output
    assert "MB are free there" in ended.output
    assert checkpoints(run_dir) == ["step_00000002", "step_00000004"]
    (run_dir / "filler").unlink()
    again = rig.run("run", place=small_disk)
    assert set(again.statuses) == {0}, again.output[-3000:]
    assert metrics(run_dir) == metrics(whole)
    assert weights(run_dir) == weights(whole)


FULL = """
import os
from dpo.tracking import monitor, run_folder
from torch.utils.tensorboard import SummaryWriter
record, write, scalar = monitor.Monitor.record, run_folder.write_file, SummaryWriter.add_scalar
def on_full_disk(self, step, values):
    if step == 5 and self._enabled:
        self._file = open("/dev/full", "a", buffering=1)
    return record(self, step, values)
def refuse(path, *rest, **named):
    if path.name == "config.yaml":
        raise OSError(5, "Input/output error", str(path))
    return write(path, *rest, **named)
def lose(self, tag, value, step):
    if step == 5:
        raise OSError(28, "No space left on device")
    return scalar(self, tag, value, step)
{what}
"""


@pytest.mark.fault(
    "ENOSPC or EIO on metrics.jsonl or config.yaml",
    "one line, status 2, with the newest checkpoint; with room, the run ends the same",
)
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("monitor.Monitor.record = on_full_disk", "metrics.jsonl: No space left on device"),
        ("run_folder.write_file = refuse", "config.yaml: Input/output error"),
    ],
    ids=["metrics.jsonl", "config.yaml"],
)
def test_a_disk_that_fails_elsewhere(rig: Rig, whole: Path, what: str, said: str) -> None:
    name = f"disk_{said.partition('.')[0]}"
    ended = rig.run(name, before=FULL.format(what=what), seconds=60)
    assert set(ended.statuses) == {2}, ended.output[-3000:]
    assert ended.status == 2
    assert said in ended.message
    expected = "resume from" if "metrics" in said else "there is no checkpoint yet"
    assert expected in ended.message
    assert "Traceback" not in ended.output
    again = rig.completed(name)
    assert metrics(again) == metrics(whole)
    assert weights(again) == weights(whole)


@pytest.mark.fault("TensorBoard's file cannot be written", "said once; the run continues to the same end")
def test_curves_may_be_lost_and_the_run_not(rig: Rig, whole: Path) -> None:
    run_dir = rig.completed("curves", before=FULL.format(what="SummaryWriter.add_scalar = lose"))
    assert metrics(run_dir) == metrics(whole)
    assert weights(run_dir) == weights(whole)


@pytest.mark.fault(
    "too little disk space for the checkpoints, known in advance",
    "status 2 with the numbers, before a model is loaded",
)
def test_too_little_space_is_reported_before_loading(rig: Rig, small_disk: Path) -> None:
    remount(small_disk, "size=1m")
    ended = rig.run("run", place=small_disk)
    assert set(ended.statuses) == {2}, ended.output[-3000:]
    assert "needs about" in ended.output
    assert "train.keep_last" in ended.output
    assert "step/s" not in ended.output


@pytest.mark.fault(
    "a read-only run folder, new or existing",
    "status 2 and a one-line message",
)
def test_a_read_only_folder_is_refused(rig: Rig, whole: Path, small_disk: Path) -> None:
    shutil.copytree(whole, small_disk / "run")
    remount(small_disk, "ro")
    for name in ("run", "new"):
        ended = rig.run(name, place=small_disk)
        assert set(ended.statuses) == {2}, ended.output[-3000:]
        assert "Read-only file system" in ended.output
        assert "Traceback" not in ended.output
