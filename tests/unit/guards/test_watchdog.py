"""What a rank learns of the others: which is gone, which failed first, which is behind.

The others are records in a store here; tests/faults has real ranks.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dpo import distributed
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.guards import watchdog
from dpo.guards.watchdog import PREFIX, Heartbeat, Watchdog
from dpo.tracking.run_folder import RunFolder


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store of rank 0, this process, and of a rank 1 that does not exist."""
    store = dist.HashStore()
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(watchdog, "GONE_AFTER_SECONDS", 0.4)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    return dist.PrefixStore(PREFIX, store)


def beat(store: Any, beats: int, progress: int = 0) -> None:
    heart = Heartbeat(host="node7", pid=77, beats=beats, progress=progress, doing="step 4")
    store.set("rank/1", json.dumps(asdict(heart)))


@contextmanager
def alive(store: Any, progress: int = 0) -> Iterator[None]:
    """Rank 1 sends heartbeats meanwhile."""
    ended = threading.Event()

    def work() -> None:
        beats = 0
        while not ended.wait(0.02):
            beat(store, beats := beats + 1, progress)

    thread = threading.Thread(target=work)
    beat(store, 0, progress)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_alone_an_error_is_its_own_reason(tmp_path: Path) -> None:
    error = RuntimeError("mine")
    dog = Watchdog(RunFolder(tmp_path), "train", 60)
    with dog:
        dog.publish_end(error)
        assert dog.explain(error) is error


def test_a_rank_without_heartbeats_is_gone(others: Any, tmp_path: Path) -> None:
    beat(others, 9)
    with Watchdog(RunFolder(tmp_path), "train", 60) as dog:
        reason = dog.explain(RuntimeError("a connection was closed"))
    assert isinstance(reason, RunFailed)
    assert str(reason) == ("rank 1 (node7, process 77, last seen: step 4) is gone: killed, or out of memory")


class Gone:
    """A store whose rank has exited."""

    def __getattr__(self, name: str) -> Any:
        raise dist.DistNetworkError("connection reset by peer")


def test_the_reason_of_a_rank_that_took_the_store_with_it_is_known(others: Any, tmp_path: Path) -> None:
    others.set("end/1", json.dumps({"rank": 1, "kind": "UserError", "message": "metrics.jsonl: disk full"}))
    with Watchdog(RunFolder(tmp_path), "train", 60) as dog:
        for _ in range(100):
            if dog._first_end is not None:
                break
            time.sleep(0.02)
        dog._store = Gone()
        time.sleep(0.2)  # the thread meets it first
        reason = dog.explain(RuntimeError("a connection was closed"))
    assert isinstance(reason, UserError)
    assert str(reason) == "rank 1: metrics.jsonl: disk full"


def test_the_rank_that_fails_first_is_the_reason(others: Any, tmp_path: Path) -> None:
    error = ZeroDivisionError("mine")
    with alive(others), Watchdog(RunFolder(tmp_path), "train", 60) as dog:
        assert dog.explain(error) is error
    assert json.loads(others.get("end/1")) == {
        "rank": 0,
        "kind": "ZeroDivisionError",
        "message": "ZeroDivisionError: mine",
    }


@pytest.mark.parametrize("kind", [UserError, StoppedBySignal, RunFailed, ValueError])
def test_the_reason_of_another_rank_keeps_its_kind(
    others: Any, tmp_path: Path, kind: type[Exception]
) -> None:
    others.set("end/of/1", "")
    number = others.add("ends", 1)
    others.set(f"end/{number}", json.dumps({"rank": 1, "kind": kind.__name__, "message": "its reason"}))
    beat(others, 3)  # no more heartbeats, since it has ended: it is not gone
    with Watchdog(RunFolder(tmp_path), "train", 60) as dog:
        reason = dog.explain(RuntimeError("a connection was closed"))
    assert type(reason) is (RunFailed if kind is ValueError else kind)
    assert str(reason) == "rank 1: its reason"


class Lost:
    """A store whose host has died."""

    def __getattr__(self, name: str) -> Any:
        raise dist.DistNetworkError("connection reset")


def test_a_dead_rank_0_is_named_although_it_held_the_store(
    others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    dog = Watchdog(RunFolder(tmp_path), "train", 60)
    dog._store = Lost()
    dog.publish_end(RuntimeError("nobody listens"))
    reason = dog.explain(RuntimeError("mine"))
    assert str(reason).startswith("rank 0")
    assert "is gone" in str(reason)
    left = json.loads((tmp_path / "exit.json").read_text())  # by rank 1: rank 0 cannot
    assert (left["status"], left["message"]) == (1, str(reason))


def stuck(dog: Watchdog, seconds: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Statuses with which the watchdog ended the process while nothing went on for some seconds."""
    ended: list[int] = []

    def leave(status: int) -> None:
        ended.append(status)
        dog._ended.set()

    monkeypatch.setattr(os, "_exit", leave)
    with dog:
        until = time.monotonic() + seconds
        while not ended and time.monotonic() < until:
            time.sleep(0.01)
    return ended


def test_a_rank_without_progress_ends_and_says_who_is_behind(
    others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").touch()
    with alive(others, progress=1):
        dog = Watchdog(RunFolder(tmp_path), "train", 0.2)
        for _ in range(3):
            dog.progress("step 5")
        assert stuck(dog, 30, monkeypatch) == [1]
    said = capfd.readouterr().err
    assert "no progress for 0 s (train.stuck_after_seconds: 0.2); behind: rank 1 (node7, process 77" in said
    assert "test_watchdog.py" in (tmp_path / "stacks" / "rank_00000.txt").read_text()
    assert "behind: rank 1" in json.loads((tmp_path / "exit.json").read_text())["message"]


def test_a_single_process_that_is_stuck_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.02)
    monkeypatch.setattr(watchdog, "GONE_AFTER_SECONDS", 0.1)
    (tmp_path / "config.yaml").touch()
    dog = Watchdog(RunFolder(tmp_path), "train", 0.1)
    dog.progress("step 5")
    assert stuck(dog, 30, monkeypatch) == [1]
    assert "behind: rank 0" in json.loads((tmp_path / "exit.json").read_text())["message"]


def test_progress_keeps_the_run_going_and_before_the_first_nothing_is_stuck(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.02)
    assert stuck(Watchdog(RunFolder(tmp_path), "train", 0.01), 0.3, monkeypatch) == []
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    with Watchdog(RunFolder(tmp_path), "train", 30) as dog:
        for _ in range(10):
            dog.progress("step 1")
            time.sleep(0.02)
    assert ended == []


def test_the_reason_that_is_there_already_stays(others: Any, tmp_path: Path) -> None:
    dog = Watchdog(RunFolder(tmp_path), "train", 60)
    (tmp_path / "exit.json").write_text("{}")
    later = time.time() + 1  # a file's own time is coarser than the clock
    os.utime(tmp_path / "exit.json", (later, later))
    dog._report({}, "a later reason")
    assert (tmp_path / "exit.json").read_text() == "{}"
