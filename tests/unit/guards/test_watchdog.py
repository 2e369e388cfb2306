"""What a rank learns of the others: which is gone, which failed first, which is behind.

The others are records in a store here; tests/faults has real ranks.
"""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from heartbeats import Gone, beat, end_of_1, heart, listening, living

from dpo import alive, distributed
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.guards import hearts
from dpo.guards.hearts import behind
from dpo.guards.watchdog import Watchdog
from dpo.processes import this_process
from dpo.tracking.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("quickly")


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
