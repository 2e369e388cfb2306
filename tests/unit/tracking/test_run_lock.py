"""Who trains in a run folder: one process, found dead or alive, here and on another machine."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path

import pytest

from dpo import alive
from dpo.errors import RunInUse
from dpo.tracking import run_lock
from dpo.tracking.run_folder import RunFolder
from dpo.tracking.run_lock import RunLock, holder_of, refuse_if_in_use


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    monkeypatch.setattr(run_lock, "TOUCH_SECONDS", 0.05)
    monkeypatch.setattr(run_lock, "DEAD_AFTER_SECONDS", 0.5)
    monkeypatch.setattr(run_lock, "SETTLE_SECONDS", 0.01)
    return RunFolder(tmp_path / "run")


def hold(folder: RunFolder, **changed: object) -> None:
    """The lock of another process."""
    folder.path.mkdir(exist_ok=True)
    holder = replace(run_lock._this_process(), **changed)  # type: ignore[arg-type]
    folder.lock.write_text(json.dumps(asdict(holder)))


def test_a_lock_that_was_never_written_is_taken_over_and_the_wait_is_no_hang(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs: list[float] = []
    monkeypatch.setattr(alive, "advanced", lambda: signs.append(time.monotonic()))
    folder.path.mkdir()
    folder.lock.touch()  # its process was killed between making and writing it
    began = time.monotonic()
    with RunLock(folder):
        moments = [began, *signs, time.monotonic()]
        assert holder_of(folder) is not None
    assert moments[-1] - began >= run_lock.DEAD_AFTER_SECONDS
    assert max(later - earlier for earlier, later in pairwise(moments)) < run_lock.DEAD_AFTER_SECONDS / 2


def test_the_second_process_is_refused_and_told_who_is_there(folder: RunFolder) -> None:
    with RunLock(folder):
        assert folder.is_run
        with pytest.raises(RunInUse, match=f"run_dir: .*process {os.getpid()} on "):
            RunLock(folder).__enter__()
        with pytest.raises(RunInUse, match="run_dir"):
            refuse_if_in_use(folder, patient=False)
    assert not folder.lock.exists()
    with RunLock(folder):
        pass


def test_a_lock_of_a_process_that_was_killed_is_taken_over(folder: RunFolder) -> None:
    code = (
        "import os, sys\n"
        "from dpo.tracking.run_folder import RunFolder\n"
        "from dpo.tracking.run_lock import RunLock\n"
        "from pathlib import Path\n"
        "RunLock(RunFolder(Path(sys.argv[1]))).__enter__()\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder.path)], check=False)
    assert folder.lock.is_file()
    began = time.monotonic()
    with RunLock(folder):
        holder = holder_of(folder)
        assert holder is not None
        assert holder.pid == os.getpid()
    assert time.monotonic() - began < 0.4  # its number says that it is gone


def test_a_number_that_was_given_to_another_process_is_no_holder(folder: RunFolder) -> None:
    hold(folder, began="1")
    with RunLock(folder):
        pass


def test_a_holder_on_another_machine_that_is_alive_is_respected(folder: RunFolder) -> None:
    hold(folder, host="node7", place="elsewhere", pid=77)
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(0.1):
            os.utime(folder.lock)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        refuse_if_in_use(folder, patient=False)  # a check does not wait to find out
        with pytest.raises(RunInUse, match="process 77 on node7"):
            RunLock(folder).__enter__()
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("content", [None, "", "{"])
def test_a_silent_lock_of_another_machine_is_taken_over(folder: RunFolder, content: str | None) -> None:
    hold(folder, place="elsewhere")
    if content is not None:
        folder.lock.write_text(content)  # killed while it was written
    with RunLock(folder):
        holder = holder_of(folder)
        assert holder is not None
        assert holder.pid == os.getpid()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_holder_that_was_stopped_for_too_long_ends(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    statuses: list[int] = []

    def ended(status: int) -> None:
        statuses.append(status)
        sys.exit()  # the thread, as the process would

    monkeypatch.setattr(os, "_exit", ended)
    with RunLock(folder):
        hold(folder, host="node7", pid=77)
        for _ in range(100):
            if statuses:
                break
            time.sleep(0.02)
    assert statuses == [1]
    assert "process 77 on node7" in capsys.readouterr().err
    assert folder.lock.is_file()  # it is the other's


def test_a_folder_that_is_no_run_is_not_written_to(folder: RunFolder) -> None:
    folder.path.mkdir()
    (folder.path / "thesis.tex").touch()
    with RunLock(folder):
        assert [path.name for path in folder.path.iterdir()] == ["thesis.tex"]
