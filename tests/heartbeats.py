"""A watchdog whose other ranks are records in a store, for tests of one process."""

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

from dpo.guards.hearts import Heartbeat
from dpo.guards.watchdog import Watchdog
from dpo.processes import Process
from dpo.tracking.run_folder import RunFolder

ELSEWHERE = Process(host="node7", pid=77, place="another machine", began="1")


def heart(beats: int = 0, **values: Any) -> Heartbeat:
    given = {"process": ELSEWHERE, "doing": "step 4", "steps": 0, "idle": 0.0, "waits": False, "loads": False}
    return Heartbeat(beats=beats, **{**given, **values})


def beat(store: Any, beats: int, **values: Any) -> None:
    store.set("rank/1", json.dumps(asdict(heart(beats, **values))))


@contextmanager
def living(store: Any, **values: Any) -> Iterator[None]:
    """Rank 1 sends heartbeats meanwhile."""
    ended = threading.Event()

    def work() -> None:
        beats = 0
        while not ended.wait(0.02):
            beat(store, beats := beats + 1, **values)

    thread = threading.Thread(target=work)
    beat(store, 0, **values)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def listening(folder: Path, stuck_after: float = 60) -> Iterator[Watchdog]:
    with Watchdog(RunFolder(folder), "train", stuck_after) as dog:
        dog.listen()
        yield dog


def end_of_1(store: Any, kind: str, message: str) -> None:
    store.set("end/of/1", "")
    number = store.add("ends", 1)
    store.set(f"end/{number}", json.dumps({"rank": 1, "kind": kind, "message": message}))


@contextmanager
def watched(dog: Watchdog, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The statuses with which the watchdog ended the process."""
    ended: list[int] = []

    def leave(status: int) -> None:
        ended.append(status)
        dog._ended.set()

    monkeypatch.setattr(os, "_exit", leave)
    with dog:
        dog.listen()
        yield ended


def wait_for_end(ended: list[int], seconds: float = 30) -> list[int]:
    until = time.monotonic() + seconds
    while not ended and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.05)
    return ended


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "exit.json").read_text()))


class Gone:
    """A store whose rank has exited."""

    def __getattr__(self, name: str) -> Any:
        raise dist.DistNetworkError("connection reset by peer")
