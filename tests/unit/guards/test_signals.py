"""A signal sets a flag while the loop runs, and ends the command before; quick repeats are one request."""

import os
import signal
from collections.abc import Iterator

import pytest

from dpo.errors import StoppedBySignal
from dpo.guards import signals
from dpo.guards.signals import STOPPING, StopRequests
from dpo.interrupts import deferred


@pytest.fixture(autouse=True)
def as_python_starts() -> Iterator[None]:
    """Another test of this process may have ended a run, which ignores signals from then on."""
    defaults = {number: signal.SIG_DFL for number in STOPPING} | {signal.SIGINT: signal.default_int_handler}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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


def test_before_the_loop_a_signal_waits_for_the_end_of_a_block_that_shares_locks() -> None:
    reached = []

    def work() -> None:
        with deferred():
            send(signal.SIGTERM)
            reached.append("end")

    with StopRequests(), pytest.raises(StoppedBySignal, match="SIGTERM"):
        work()
    assert reached == ["end"]


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


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests():
            send(signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
