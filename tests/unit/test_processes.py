"""A rank ends with its launcher, however early that dies, and waits for no lock that a killed one left."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo import processes
from dpo.processes import LAUNCHED, SUPERVISOR, end_with_launcher

SUPERVISE = Path(__file__).parents[2] / "launch" / "supervise.py"
linux = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")

PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=sys.stdout)
os.read(0, 1)
os._exit(0)
"""
CHILD = """
import signal, sys, time
from dpo.processes import end_with_launcher
signal.signal(signal.SIGTERM, lambda *_: (print("SIGTERM", flush=True), sys.exit(0)))
end_with_launcher()
print("ready", flush=True)
while True:
    time.sleep(0.1)
"""


@linux
def test_a_rank_of_torchelastic_is_signalled_when_its_launcher_dies() -> None:
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "test"}
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.format(child=CHILD)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent:
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
        assert parent.stdout.readline() == "SIGTERM\n"


def test_without_torchelastic_nothing_is_asked_of_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(processes.ctypes, "CDLL", lambda name: pytest.fail("the kernel was asked"))
    end_with_launcher()


@linux
def test_a_rank_whose_launcher_has_died_already_exits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCHED, "test")
    monkeypatch.setenv(SUPERVISOR, str(os.getpid()))  # it has inherited the child
    command = [sys.executable, "-m", "dpo", "--help"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    monkeypatch.delenv(SUPERVISOR)
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    profiled = ["sh", "-c", f"{sys.executable} -m dpo --help; exit $?"]  # a program between the two
    assert subprocess.run(profiled, capture_output=True, check=False).returncode == 0


@linux
def test_a_rank_that_nobody_waits_for_exits_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCHED, "test")
    status, message = tmp_path / "status", tmp_path / "message"
    record = f"echo $? >{status}.new; mv {status}.new {status}"
    rank = f"sleep 0.5; {sys.executable} -m dpo --help 2>{message}; {record}"
    subprocess.run(["sh", "-c", f"({rank}) >/dev/null & exit 0"], check=True)  # its parent is gone by then
    for _ in range(200):
        if status.is_file():
            break
        time.sleep(0.05)
    assert status.read_text() == "1\n"
    assert "the launcher has ended" in message.read_text()


RANK = """
import signal, sys, time
def save(*_):
    time.sleep(1)
    open(sys.argv[1], "w").write("saved")
    sys.exit(3)
signal.signal(signal.SIGTERM, save)
import ctypes
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
print("ready", flush=True)
while True:  # signal.pause would miss a signal that arrives just before it
    time.sleep(0.1)
"""
LAUNCHER = """
import subprocess, sys
sys.exit(subprocess.Popen([sys.executable, "-c", sys.argv[1], sys.argv[2]], start_new_session=True).wait())
"""


@linux
@pytest.mark.parametrize("killed", ["the launcher", "launch/run"])
def test_what_the_launcher_leaves_is_waited_for(tmp_path: Path, killed: str) -> None:
    saved = tmp_path / "saved"
    words = [sys.executable, "-c", LAUNCHER, RANK, str(saved)]
    shell = f'"{sys.executable}" "{SUPERVISE}" $$ "$@" & wait $!; exit $?'
    run = subprocess.Popen(["bash", "-c", shell, "run", *words], stdout=subprocess.PIPE, text=True)
    with run:
        assert run.stdout is not None
        assert run.stdout.readline() == "ready\n"
        (supervisor,) = _children(run.pid)
        (launcher,) = _children(supervisor)
        os.kill(launcher if killed == "the launcher" else run.pid, 9)
        status = run.wait(10)
        if killed == "the launcher":
            assert saved.is_file()  # before launch/run goes on
            assert status == 128 + 9
        for _ in range(600):  # 30 s: a busy machine starts and ends interpreters slowly
            if saved.is_file() and not Path(f"/proc/{supervisor}").exists():
                break
            time.sleep(0.05)
        assert saved.read_text() == "saved"
        assert not Path(f"/proc/{launcher}").exists()


def _children(pid: int) -> list[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for file in lists for child in file.read_text().split()]


def test_a_lock_of_a_build_that_was_killed_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(processes, "LONGEST_BUILD_SECONDS", 60.0)
    for name in ("old", "built"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        os.utime(tmp_path / name / "lock", (1, 1))
    with (tmp_path / "built" / "lock").open():  # as its builder keeps it
        processes.remove_abandoned_build_locks()
    assert not (tmp_path / "old" / "lock").exists()
    assert (tmp_path / "built" / "lock").exists()
    assert str(tmp_path / "old" / "lock") in capsys.readouterr().out


def test_a_young_lock_without_a_builder_here_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(processes, "LONGEST_BUILD_SECONDS", 1.0)
    (tmp_path / "op").mkdir()
    lock = tmp_path / "op" / "lock"
    lock.touch()
    processes.remove_abandoned_build_locks()
    assert not lock.exists()
    assert capsys.readouterr().out.count("waiting") == 1
