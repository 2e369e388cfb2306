"""A signal sets a flag while the loop runs, and ends the command before; quick repeats are one request."""

import os
import signal
import subprocess
import sys

import pytest

from dpo.errors import StoppedBySignal
from dpo.guards import signals
from dpo.guards.signals import STOPPING, StopRequests, end_with_launcher


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOPPING)
def test_in_the_loop_a_signal_sets_a_flag(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    with StopRequests() as stop:
        stop.wait_for_step()
        assert not stop.requested
        send(number)
        assert stop.requested
        assert stop.name == number.name
    assert f"{number.name}: saving after this step; a second signal exits at once" in capfd.readouterr().err


def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "1")
    with StopRequests() as stop:
        stop.wait_for_step()
        send(signal.SIGTERM)
        assert stop.requested
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("number", STOPPING)
def test_before_the_loop_a_signal_ends_the_command(number: signal.Signals) -> None:
    with StopRequests(), pytest.raises(StoppedBySignal, match=number.name):
        send(number)


def test_a_signal_that_some_library_swallowed_before_the_loop_ends_the_command_at_its_start() -> None:
    with StopRequests() as stop:
        with pytest.raises(StoppedBySignal):
            send(signal.SIGTERM)
        with pytest.raises(StoppedBySignal, match="SIGTERM"):
            stop.wait_for_step()


def test_repeats_within_seconds_are_one_request() -> None:
    with StopRequests() as stop:
        stop.wait_for_step()
        send(signal.SIGUSR1)
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert stop.name == "SIGUSR1"


def test_a_second_signal_later_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(signals, "REPEATS_WITHIN_SECONDS", 0.0)
    monkeypatch.setattr(os, "_exit", ended.append)
    with StopRequests() as stop:
        stop.wait_for_step()
        send(signal.SIGINT)
        assert ended == []
        send(signal.SIGINT)
    assert ended == [1]


def test_after_saving_the_launchers_signals_are_ignored_to_the_end() -> None:
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        with StopRequests() as stop:
            stop.wait_for_step()
            send(signal.SIGTERM)
            stop.ignore_more()
            send(signal.SIGTERM)
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in STOPPING)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_the_handlers_of_before_come_back() -> None:
    before = {number: signal.getsignal(number) for number in STOPPING}
    with StopRequests():
        assert all(signal.getsignal(number) != handler for number, handler in before.items())
    assert {number: signal.getsignal(number) for number in STOPPING} == before


PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {child!r}], stdout=sys.stdout)
os.read(0, 1)
os._exit(0)
"""
CHILD = """
import signal, sys
from dpo.guards.signals import end_with_launcher
signal.signal(signal.SIGTERM, lambda *_: (print("SIGTERM", flush=True), sys.exit(0)))
end_with_launcher()
print("ready", flush=True)
signal.pause()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
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
    monkeypatch.setattr(signals.ctypes, "CDLL", lambda name: pytest.fail("the kernel was asked"))
    end_with_launcher()
