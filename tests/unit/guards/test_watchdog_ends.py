"""When the watchdog ends a process whose main thread cannot; the other ranks are records in a store."""

import json
import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from heartbeats import ELSEWHERE, Gone, beat, end_of_1, living, record, wait_for_end, watched

from dpo import alive, distributed
from dpo.guards import watchdog
from dpo.guards.watchdog import Watchdog
from dpo.processes import Process, this_process
from dpo.tracking.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("quickly")


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
    assert "test_watchdog_ends.py" in (tmp_path / "stacks" / "rank_00000.txt").read_text()


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
    assert "test_watchdog_ends.py" in (tmp_path / "stacks" / "rank_00000.txt").read_text()
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
    assert ("test_watchdog_ends.py" in capfd.readouterr().err) is foreign


def test_a_rank_that_waits_for_others_to_join_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.yaml").touch()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with watched(Watchdog(RunFolder(tmp_path), "train", 0.1), monkeypatch) as ended:
        assert wait_for_end(ended) == [1]
    assert "not all ranks have joined" in record(tmp_path)["message"]
