"""Pruning a cache that is killed, damaged, read-only, or used by other processes: no row is lost."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from unit.reference.samples import (
    append,
    content,
    files,
    keys,
    made,
    number_of_rows,
    padded,
    random_rows,
    token_rows,
    tokens_in_use,
)

from dpo.errors import UserError
from dpo.reference import prune as prune_module
from dpo.reference.prune import cache_info, prune, verify
from dpo.reference.shards import read_shard, write_shard
from dpo.reference.store import ReferenceStore
from dpo.reference.table import index_keys


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return made(tmp_path)


class KilledError(Exception):
    """Takes the place of SIGKILL: no code of ours catches it."""


def test_killed_before_old_shards_are_removed_it_loses_no_row(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(store, {b"a": (-1.0, 1), b"b": (-2.00001, 1)})
    append(store, {b"b": (-2.0, 1), b"c": (-3.0, 1)})
    store.append(token_rows({b"c": [-3.00001], b"d": [-4.0, -5.0]}))
    sums, tokens = content(store), tokens_in_use(store)

    def die(*_: Any, **__: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        with pytest.raises(KilledError):
            prune(store, None, dry_run=False)
    assert number_of_rows(store) > len(sums) + 1
    assert (content(store), tokens_in_use(store)) == (sums, tokens)
    prune(store, None, dry_run=False)  # the next call completes the work
    assert (content(store), tokens_in_use(store)) == (sums, tokens)
    assert number_of_rows(store) == 5  # c is there twice: its sum in use is not that of its tokens


def test_killed_after_some_old_shards_are_removed_it_loses_no_row(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(4):
        store.append(random_rows(3, seed, with_tokens=seed % 2 == 1))
    sums, tokens = content(store), tokens_in_use(store)
    unlink, calls = Path.unlink, iter(range(99))

    def die_later(path: Path, **options: Any) -> None:
        if next(calls) == 2:
            raise KilledError
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die_later)
        with pytest.raises(KilledError):
            prune(store, None, dry_run=False)
    assert len(store.shards()) == 4  # two old ones and the two that replace all
    assert (content(store), tokens_in_use(store)) == (sums, tokens)


def test_a_damaged_cache_is_not_changed(store: ReferenceStore) -> None:
    append(store, {b"a": (-1.0, 1)})
    damaged = append(store, {b"b": (-2.0, 1)})
    damaged.write_bytes(damaged.read_bytes()[:-9])
    before = files(store.path)
    with pytest.raises(UserError, match="damaged shard"):
        prune(store, None, dry_run=False)
    assert files(store.path) == before


def test_a_shard_that_another_process_writes_meanwhile_is_not_touched(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(store, {b"a": (-1.0, 1)})
    append(store, {b"b": (-2.0, 1)})
    written: list[Path] = []

    def write_while_another_writes(*arguments: Any, **options: Any) -> Path:
        written.append(append(store, {b"c": (-3.0, 1)}))
        return write_shard(*arguments, **options)

    monkeypatch.setattr(prune_module, "write_shard", write_while_another_writes)
    prune(store, index_keys(keys(b"a", b"b"))[0], dry_run=False)
    assert written[0].is_file()
    assert content(store) == padded({b"a": (-1.0, 1), b"b": (-2.0, 1), b"c": (-3.0, 1)})


@pytest.mark.parametrize("action", [cache_info, verify, lambda store: prune(store, None, dry_run=True)])
def test_shards_that_are_joined_meanwhile_are_read_again(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch, action: Any
) -> None:
    append(store, {b"a": (-1.0, 1)})
    append(store, {b"b": (-2.0, 1)})
    left = [True]

    def join_first(path: Path, *arguments: Any, **options: Any) -> Any:
        if left and left.pop():
            old = store.shards()
            append(store, {b"a": (-1.0, 1), b"b": (-2.0, 1)})
            for shard in old:
                shard.unlink()
        return read_shard(path, *arguments, **options)

    monkeypatch.setattr(prune_module, "read_shard", join_first)
    action(store)
    assert not left
    assert len(content(store)) == 2


def test_a_disk_that_became_read_only_is_a_user_error(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(store, {b"a": (-1.0, 1)})
    append(store, {b"b": (-2.0, 1)})

    def read_only(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    with monkeypatch.context() as context:
        context.setattr(Path, "unlink", read_only)
        with pytest.raises(UserError, match=rf"{store.path}: .*Read-only file system"):
            prune(store, None, dry_run=False)
        context.setattr(os, "open", read_only)
        with pytest.raises(UserError, match=rf"{store.path}: .* 1 rows .Read-only file system"):
            append(store, {b"c": (-3.0, 1)})
    assert len(content(store)) == 2
