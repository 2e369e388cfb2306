"""How a command ends: its own reason, or that of the rank that failed first."""

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
from dpo.guards import watchdog
from dpo.guards.guard import Guard
from dpo.guards.watchdog import PREFIX
from dpo.tracking import run_lock
from dpo.tracking.run_folder import RunFolder


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The store of this process, rank 0 of 2; rank 1 is what a test writes there."""
    store = dist.HashStore()
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(watchdog, "GONE_AFTER_SECONDS", 0.2)
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
    monkeypatch.setattr(watchdog.Watchdog, "_gone", lambda self: os.kill(os.getpid(), signal.SIGTERM) or {})
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
