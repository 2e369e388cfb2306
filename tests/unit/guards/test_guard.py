"""Around a command: signals, the watchdog and the lock together, and one reason for all ranks."""

import errno
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dpo import distributed
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.guards import hearts
from dpo.guards.guard import Guard
from dpo.guards.hearts import PREFIX, Hearts
from dpo.guards.signals import STOPPING, StopRequestedError
from dpo.guards.watchdog import Watchdog
from dpo.tracking import run_lock
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


def test_a_rank_that_dies_while_all_take_the_lock_is_named(
    guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(lock: object) -> None:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(run_lock.RunLock, "__enter__", fails)
    monkeypatch.setattr(Watchdog, "explain", lambda self, error: RunFailed("rank 1 is gone"))
    with pytest.raises(RunFailed, match="rank 1 is gone"), guard:
        pass
    assert guard._watchdog._ended.is_set()


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


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store of this process, rank 0 of 2; rank 1 is what a test writes there."""
    store = dist.HashStore()
    monkeypatch.setattr(hearts, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(hearts, "GONE_AFTER_SECONDS", 0.2)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "on_main", lambda work: work())
    return dist.PrefixStore(PREFIX, store)


def rank_1_ended(store: Any, kind: str, message: str) -> None:
    store.add("ends", 1)
    store.set("end/of/1", "")
    store.set("end/1", json.dumps({"rank": 1, "kind": kind, "message": message}))


def test_the_launchers_signal_is_not_the_reason_where_a_rank_has_failed(store: Any, tmp_path: Path) -> None:
    rank_1_ended(store, "ValueError", "ValueError: a broken file")
    with (
        pytest.raises(RunFailed, match="rank 1: ValueError: a broken file"),
        Guard(RunFolder(tmp_path), "train", 60),
    ):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_to_all_ranks_is_one(store: Any, tmp_path: Path) -> None:
    rank_1_ended(store, "StoppedBySignal", "SIGTERM before the first step")
    with pytest.raises(StoppedBySignal, match=r"^SIGTERM"), Guard(RunFolder(tmp_path), "train", 60):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_that_comes_while_the_reason_is_looked_for_does_not_replace_it(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_1_ended(store, "UserError", "data.train: row 3")
    monkeypatch.setattr(Hearts, "silent", lambda self: os.kill(os.getpid(), signal.SIGTERM) or {})
    with (
        pytest.raises(UserError, match=r"rank 1: data\.train: row 3"),
        Guard(RunFolder(tmp_path), "train", 60),
    ):
        raise RuntimeError("a connection was closed")


def test_only_training_locks_the_folder(tmp_path: Path) -> None:
    with Guard(RunFolder(tmp_path), "train", 60):
        assert run_lock.holder_of(RunFolder(tmp_path)) is not None
        with Guard(RunFolder(tmp_path), "precompute-ref", 60, exclusive=False):
            pass
        with pytest.raises(UserError), Guard(RunFolder(tmp_path), "sft", 60):
            pass
    assert run_lock.holder_of(RunFolder(tmp_path)) is None


@pytest.mark.parametrize("kept", [True, False])
def test_a_disk_that_fails_is_one_line_with_what_was_kept(tmp_path: Path, kept: bool) -> None:
    folder = RunFolder(tmp_path)
    if kept:
        folder.checkpoint(2).mkdir(parents=True)
        folder.checkpoint(4).mkdir()
    with pytest.raises(UserError) as refused, Guard(folder, "train", 60):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder.config))
    assert str(refused.value).startswith(f"{folder.config}: No space left on device")
    assert ("resume from" in str(refused.value)) is kept
    assert not kept or str(refused.value).endswith("step_00000004")
    with pytest.raises(FileNotFoundError), Guard(folder, "train", 60):  # a bug of ours keeps its traceback
        (tmp_path / "nothing").read_text()
