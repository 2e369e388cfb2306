"""What a rank learns of the others: which is gone, which failed first, which is behind.

The others are records in a store here; tests/faults has real ranks.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from dpo import alive, distributed
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.guards import hearts, watchdog
from dpo.guards.hearts import PREFIX, Heartbeat, behind
from dpo.guards.watchdog import Watchdog
from dpo.processes import Process, this_process
from dpo.tracking.run_folder import RunFolder

ELSEWHERE = Process(host="node7", pid=77, place="another machine", began="1")


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hearts, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(hearts, "GONE_AFTER_SECONDS", 0.4)
    monkeypatch.setattr(hearts, "SILENT_AFTER_SECONDS", 0.4)
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.3)
    alive.life.steps = 0  # other tests of this process have made some


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store of rank 0, this process, and of a rank 1 that does not exist."""
    store = dist.HashStore()
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    return dist.PrefixStore(PREFIX, store)


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


def test_alone_an_error_is_its_own_reason(tmp_path: Path) -> None:
    error = RuntimeError("mine")
    with listening(tmp_path) as dog:
        dog.publish_end(error)
        assert dog.explain(error) is error


def test_a_rank_without_heartbeats_is_gone(others: Any, tmp_path: Path) -> None:
    beat(others, 9)
    with listening(tmp_path) as dog:
        reason = dog.explain(RuntimeError("a connection was closed"))
    assert isinstance(reason, RunFailed)
    assert str(reason) == "rank 1 (node7, process 77, last seen: step 4) is gone: killed, or out of memory"


def test_a_rank_that_died_before_its_first_heartbeat_is_gone(others: Any, tmp_path: Path) -> None:
    with listening(tmp_path) as dog:
        reason = dog.explain(StoppedBySignal("SIGTERM before the first step"))
    assert str(reason).startswith("rank 1 (unknown machine, process 0, last seen: joining) is gone")


def test_a_rank_of_this_machine_is_gone_when_its_process_is_and_not_before(
    others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beat(others, 9, process=this_process())  # silent, as one that was stopped
    error = RuntimeError("mine")
    with listening(tmp_path) as dog:
        assert dog.explain(error) is error
    monkeypatch.setattr(hearts, "GONE_AFTER_SECONDS", 60.0)
    with living(others, process=replace(this_process(), began="0")), listening(tmp_path) as dog:
        others.delete_key("ends")
        assert "rank 1" in str(dog.explain(error))  # at once, although heartbeats still arrive


def test_to_look_for_the_reason_is_a_sign_of_life(others: Any, tmp_path: Path) -> None:
    with living(others), listening(tmp_path) as dog:
        alive.life.advanced_at = 0.0
        dog.explain(RuntimeError("a connection was closed"))
        assert alive.life.advanced_at > 0


class Gone:
    """A store whose rank has exited."""

    def __getattr__(self, name: str) -> Any:
        raise dist.DistNetworkError("connection reset by peer")


def test_the_reason_of_a_rank_that_took_the_store_with_it_is_known(others: Any, tmp_path: Path) -> None:
    end_of_1(others, "UserError", "metrics.jsonl: disk full")
    with listening(tmp_path) as dog:
        for _ in range(100):
            if dog._first_end is not None:
                break
            time.sleep(0.02)
        assert dog._hearts is not None
        dog._ending = True  # the main thread is about to ask
        dog._hearts._store = Gone()
        time.sleep(0.2)  # the thread meets it first
        reason = dog.explain(RuntimeError("a connection was closed"))
    assert isinstance(reason, UserError)
    assert str(reason) == "rank 1: metrics.jsonl: disk full"


def test_the_rank_that_fails_first_is_the_reason(others: Any, tmp_path: Path) -> None:
    error = ZeroDivisionError("mine")
    with living(others), listening(tmp_path) as dog:
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
    end_of_1(others, kind.__name__, "its reason")
    beat(others, 3)  # no more heartbeats, since it has ended: it is not gone
    with listening(tmp_path) as dog:
        reason = dog.explain(RuntimeError("a connection was closed"))
    assert type(reason) is (RunFailed if kind is ValueError else kind)
    assert str(reason) == "rank 1: its reason"


def test_a_dead_rank_0_is_named_although_it_held_the_store(
    others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    dog = Watchdog(RunFolder(tmp_path), "train", 60)
    dog.listen()
    assert dog._hearts is not None
    dog._hearts._store = Gone()
    dog.publish_end(RuntimeError("nobody listens"))
    reason = dog.explain(RuntimeError("mine"))
    assert str(reason).startswith("rank 0")
    assert "is gone" in str(reason)
    left = json.loads((tmp_path / "exit.json").read_text())  # by rank 1: rank 0 cannot
    assert (left["status"], left["message"]) == (1, str(reason))


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


@pytest.mark.parametrize(
    ("kind", "status"), [("UserError", 2), ("StoppedBySignal", 3), ("RunFailed", 1), ("ValueError", 1)]
)
def test_a_main_thread_that_cannot_notice_the_end_of_another_rank_is_ended(
    others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, status: int
) -> None:
    (tmp_path / "config.yaml").touch()
    with watched(Watchdog(RunFolder(tmp_path), "train", 60), monkeypatch) as ended:
        beat(others, 3)
        end_of_1(others, kind, "its reason")
        assert wait_for_end(ended) == [status]
    assert (record(tmp_path)["status"], record(tmp_path)["message"]) == (status, "rank 1: its reason")
    assert "test_watchdog.py" in (tmp_path / "stacks" / "rank_00000.txt").read_text()


@pytest.mark.parametrize("process", [ELSEWHERE, replace(this_process(), began="0")], ids=["silent", "dead"])
def test_a_main_thread_that_cannot_notice_a_dead_rank_is_ended(
    others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process: Process
) -> None:
    (tmp_path / "config.yaml").touch()
    beat(others, 3, process=process)
    with watched(Watchdog(RunFolder(tmp_path), "train", 60), monkeypatch) as ended:
        assert wait_for_end(ended) == [1]
    assert "rank 1" in record(tmp_path)["message"]
    assert "is gone: killed, or out of memory" in record(tmp_path)["message"]
    assert json.loads(others.get("end/1"))["rank"] is None  # the other ranks need not find out by themselves


@pytest.mark.parametrize("reason", ["it lives", "it has ended", "this rank says why it ends itself"])
def test_a_silent_rank_is_no_reason_to_end_where(
    others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    dog = Watchdog(RunFolder(tmp_path), "train", 60)
    beat(others, 3, process=this_process() if reason == "it lives" else ELSEWHERE)
    if reason == "it has ended":
        others.set("end/of/1", "")
    dog._ending = reason.startswith("this rank")
    with watched(dog, monkeypatch) as ended:
        assert wait_for_end(ended, 1.5) == []


def test_a_store_that_is_gone_ends_a_main_thread_that_cannot_notice_unless_the_launcher_has_died(
    others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").touch()
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    for parent, status in ((0, []), (os.getppid(), [1])):
        dog = Watchdog(RunFolder(tmp_path), "train", 60)
        dog._parent = parent
        with watched(dog, monkeypatch) as ended:
            assert dog._hearts is not None
            dog._hearts._store = Gone()
            assert wait_for_end(ended, 30 if status else 1) == status
    assert "rank 0, which holds the store" in record(tmp_path)["message"]


@pytest.mark.parametrize("stuck_after", [60, 0.2])
def test_a_store_that_does_not_answer_ends_the_run_too(
    stuck_after: float, others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").touch()
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    answers = threading.Event()

    class Frozen:
        """The store of a rank that was stopped, or of a machine that has vanished."""

        def __getattr__(self, name: str) -> Any:
            answers.wait(60)
            raise dist.DistNetworkError("too late")

    dog = Watchdog(RunFolder(tmp_path), "train", stuck_after)
    with watched(dog, monkeypatch) as ended:
        assert dog._hearts is not None
        alive.loading("a model")  # where it waits, it asks the store whether others get on
        dog._hearts._store = Frozen()
        assert wait_for_end(ended) == [1]
        answers.set()
    assert "rank 0, which holds the store" in record(tmp_path)["message"]


def test_a_rank_without_progress_ends_and_says_who_is_behind(
    others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").touch()
    dog = Watchdog(RunFolder(tmp_path), "train", 0.2)
    with living(others, steps=1, idle=9.0), watched(dog, monkeypatch) as ended:
        for _ in range(3):
            alive.step("step 5")
        assert wait_for_end(ended) == [1]
    said = capfd.readouterr().err
    assert "no progress for 0 s (train.stuck_after_seconds: 0.2); behind: rank 1 (node7, process 77" in said
    assert "test_watchdog.py" in (tmp_path / "stacks" / "rank_00000.txt").read_text()
    assert "behind: rank 1" in record(tmp_path)["message"]


@pytest.mark.parametrize("mode", ["loading", "waiting"])
def test_who_waits_or_loads_does_not_end_while_another_rank_gets_on(
    others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    (tmp_path / "config.yaml").touch()
    dog = Watchdog(RunFolder(tmp_path), "train", 0.2)
    monkeypatch.setattr(watchdog, "_work_done", lambda: (0.0, 0))
    with watched(dog, monkeypatch) as ended:
        if mode == "waiting":
            alive.step("step 5")
            alive.life.waits = 1
        with living(others, loads=True):
            assert wait_for_end(ended, 1) == []
        with living(others, loads=True, idle=9.0, doing="tokenizing"):
            assert wait_for_end(ended) == [1]
        alive.life.waits = 0
    assert "behind: rank 1 (node7, process 77, last seen: tokenizing)" in record(tmp_path)["message"]


def test_a_rank_that_was_stopped_with_its_process_does_not_get_on_for_ever(
    others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").touch()
    monkeypatch.setattr(watchdog, "_work_done", lambda: (0.0, 0))
    beat(others, 3, process=this_process(), loads=True)  # its last words: it had just got on
    with watched(Watchdog(RunFolder(tmp_path), "train", 0.2), monkeypatch) as ended:
        assert wait_for_end(ended) == [1]
    assert "behind: rank 1" in record(tmp_path)["message"]


def test_who_hangs_while_it_loads_ends_although_another_rank_computes_already(
    others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").touch()
    monkeypatch.setattr(watchdog, "_work_done", lambda: (0.0, 0))
    dog = Watchdog(RunFolder(tmp_path), "precompute-ref", 0.2)
    with living(others, steps=1), watched(dog, monkeypatch) as ended:
        assert wait_for_end(ended) == [1]
    assert "behind: rank 0" in record(tmp_path)["message"]


def test_a_hang_before_the_first_step_ends_and_work_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").touch()
    with watched(Watchdog(RunFolder(tmp_path), "precompute-ref", 0.3), monkeypatch) as ended:
        alive.loading("loading the reference")
        until = time.monotonic() + 1.5
        while time.monotonic() < until:  # a library that is busy and says nothing
            sum(range(10_000))
        assert ended == []
        assert wait_for_end(ended) == [1]
    assert "behind: rank 0" in record(tmp_path)["message"]
    assert "last seen: loading the reference" in record(tmp_path)["message"]


def test_bytes_are_signs_of_life_while_something_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with watched(Watchdog(RunFolder(tmp_path), "train", 0.3), monkeypatch) as ended:
        alive.loading("downloading")
        with (tmp_path / "file").open("wb", buffering=0) as file:
            for _ in range(40):
                file.write(bytes(100_000))
                time.sleep(0.03)
        assert ended == []


def test_a_process_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dog = Watchdog(RunFolder(tmp_path), "train", 60)
    alive.step("step 5")
    alive.life.advanced_at = dog._looked_at = time.monotonic() - 3600  # SIGSTOP an hour ago, then SIGCONT
    dog._look_at_this_rank()
    assert time.monotonic() - alive.life.advanced_at < 5


def test_who_gets_on_while_it_is_looked_at_is_not_ended(
    others: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").touch()
    dog = Watchdog(RunFolder(tmp_path), "train", 0.2)
    plain = dog._culprits
    monkeypatch.setattr(dog, "_culprits", lambda others: (plain(others), alive.step("step 6"))[0])
    with living(others), watched(dog, monkeypatch) as ended:
        alive.step("step 5")
        assert wait_for_end(ended, 1.5) == []
    assert not (tmp_path / "exit.json").exists()
    assert not (tmp_path / "stacks").exists()


def test_a_single_process_that_is_stuck_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").touch()
    with watched(Watchdog(RunFolder(tmp_path), "train", 0.1), monkeypatch) as ended:
        alive.step("step 5")
        assert wait_for_end(ended) == [1]
    assert "behind: rank 0" in record(tmp_path)["message"]
    assert "last seen: step 5" in record(tmp_path)["message"]


@pytest.mark.parametrize("foreign", [False, True])
def test_a_folder_that_is_not_a_run_yet_gets_both_record_and_stacks_and_a_foreign_one_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    if foreign:
        (tmp_path / "thesis.tex").touch()
    with watched(Watchdog(RunFolder(tmp_path), "precompute-ref", 0.1), monkeypatch) as ended:
        alive.step("reference log-probs")
        assert wait_for_end(ended) == [1]
    left = {path.name for path in tmp_path.iterdir()}
    assert left == ({"thesis.tex"} if foreign else {"exit.json", "stacks"})
    assert ("test_watchdog.py" in capfd.readouterr().err) is foreign


def test_a_rank_that_waits_for_others_to_join_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").touch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with watched(Watchdog(RunFolder(tmp_path), "train", 0.1), monkeypatch) as ended:
        assert wait_for_end(ended) == [1]
    assert "not all ranks have joined" in record(tmp_path)["message"]


def test_the_reason_that_is_there_already_stays(others: Any, tmp_path: Path) -> None:
    dog = Watchdog(RunFolder(tmp_path), "train", 60)
    (tmp_path / "exit.json").write_text("{}")
    os.utime(tmp_path / "exit.json", (0, 0))  # the clock was set back
    dog._report({}, RunFailed("a later reason"))
    assert (tmp_path / "exit.json").read_text() == "{}"


def test_behind_is_who_does_not_wait_and_has_the_fewest_steps_and_the_longest_silence() -> None:
    ranks = {0: heart(steps=9, waits=True), 1: heart(steps=4, idle=9), 2: heart(steps=4), 3: heart(steps=5)}
    assert behind(ranks).keys() == {1}
    assert behind({0: heart(steps=3), 1: heart(steps=2, idle=9)}).keys() == {1}
    assert behind({0: heart(steps=3, waits=True), 1: heart(steps=2, waits=True)}).keys() == {1}
    assert behind({0: heart(idle=9), 1: heart(idle=9.01)}).keys() == {0, 1}


def test_each_rank_is_watched_by_one_of_its_own_machine_too(
    others: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: 6)
    watched_by: dict[int, set[int]] = {}
    for rank in range(6):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setenv("LOCAL_RANK", str(rank % 3))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
        watched_by[rank] = hearts.Hearts()._watched
    assert watched_by == {0: {1}, 1: {2}, 2: {3, 0}, 3: {4}, 4: {5}, 5: {0, 3}}
