"""Around a command: signals and the watchdog together, and one reason for all ranks."""

import os
import signal
from pathlib import Path

import pytest

from dpo import distributed
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.guards.guard import Guard
from dpo.guards.signals import STOPPING, StopRequestedError
from dpo.guards.watchdog import Watchdog
from dpo.tracking.run_folder import RunFolder


@pytest.fixture
def guard(tmp_path: Path) -> Guard:
    return Guard(RunFolder(tmp_path), "train", 60)


def test_handlers_and_thread_are_gone_after_the_block(guard: Guard) -> None:
    before = {number: signal.getsignal(number) for number in STOPPING}
    with guard:
        assert {number: signal.getsignal(number) for number in STOPPING} != before
        thread = guard._watchdog._thread
        assert thread.is_alive()
    assert {number: signal.getsignal(number) for number in STOPPING} == before
    assert not thread.is_alive()


def test_before_the_loop_a_signal_ends_the_command(guard: Guard) -> None:
    with pytest.raises(StoppedBySignal), guard:
        os.kill(os.getpid(), signal.SIGTERM)


def test_an_evaluation_stops_on_all_ranks_after_a_signal(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    with guard:
        guard.stop.wait_for_step()
        guard.may_continue("evaluation")
        monkeypatch.setattr(distributed, "sum_over_ranks", lambda values: values + 1)  # another rank's flag
        with pytest.raises(StopRequestedError):
            guard.may_continue("evaluation")


@pytest.mark.parametrize("error", [UserError("bad"), StoppedBySignal("stop"), RunFailed("failed")])
def test_an_error_for_the_user_is_published_and_stays_itself(
    guard: Guard, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    published: list[Exception] = []
    monkeypatch.setattr(Watchdog, "publish_end", lambda self, error: published.append(error))
    with pytest.raises(type(error)) as raised, guard:
        raise error
    assert raised.value is error
    assert published == [error]


def test_an_error_that_another_rank_caused_becomes_its_reason(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = RunFailed("rank 1 is gone")
    monkeypatch.setattr(Watchdog, "explain", lambda self, error: reason)
    with pytest.raises(RunFailed, match="rank 1") as raised, guard:
        raise RuntimeError("connection closed")
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_an_error_of_this_rank_stays_itself(guard: Guard) -> None:
    with pytest.raises(ZeroDivisionError), guard:
        raise ZeroDivisionError
