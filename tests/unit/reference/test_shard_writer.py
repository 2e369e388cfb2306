"""However long a rank computes, it leaves few shards, at every moment, and loses no row."""

from pathlib import Path

import numpy as np
import pytest
from unit.reference.samples import IDENTITY, content, made, random_rows

from dpo.reference import shard_writer
from dpo.reference.shard_writer import MOST_SMALL_SHARDS, ShardWriter
from dpo.reference.shards import has_token_logps, read_shard, written_at
from dpo.reference.store import ReferenceStore
from dpo.reference.table import ReferenceRows


def write(store: ReferenceStore, number: int, *, with_tokens: bool = False) -> list[int]:
    """Adds that many shards of 5 rows; the number of shards after each."""
    counts = []
    with ShardWriter(store, 0.0) as writer:
        for seed in range(number):
            writer.add(random_rows(5, seed, with_tokens=with_tokens))
            counts.append(len(store.shards()))
    return counts


@pytest.mark.parametrize("with_tokens", [False, True])
def test_small_shards_are_joined_meanwhile_and_in_the_end(tmp_path: Path, with_tokens: bool) -> None:
    store = made(tmp_path)
    counts = write(store, 3 * MOST_SMALL_SHARDS, with_tokens=with_tokens)
    assert max(counts) == MOST_SMALL_SHARDS
    (shard,) = store.shards()
    assert has_token_logps(shard) is with_tokens
    apart = made(tmp_path / "apart")
    for seed in range(3 * MOST_SMALL_SHARDS):
        apart.append(random_rows(5, seed, with_tokens=with_tokens))
    assert content(store) == content(apart)
    if with_tokens:
        kept = read_shard(shard, IDENTITY.digest, token_logps=True)
        parts = [read_shard(path, IDENTITY.digest, token_logps=True) for path in apart.shards()]
        np.testing.assert_array_equal(kept.token_logps, ReferenceRows.joined(parts).token_logps)


def test_a_large_shard_is_not_joined_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shard_writer, "LARGE_BYTES", 1)
    store = made(tmp_path)
    write(store, 3 * (MOST_SMALL_SHARDS + 1) + 2)
    assert [len(read_shard(path, IDENTITY.digest)) for path in store.shards()] == [
        *[5 * (MOST_SMALL_SHARDS + 1)] * 3,
        10,
    ]


def test_after_an_error_what_was_added_is_written_as_it_is(tmp_path: Path) -> None:
    store = made(tmp_path)
    with pytest.raises(KeyboardInterrupt), ShardWriter(store, 3600.0) as writer:  # noqa: PT012
        for seed in range(4):
            writer.add(random_rows(5, seed))
        raise KeyboardInterrupt
    assert len(content(store)) == 20


def test_the_joined_shard_keeps_its_place_among_copies_by_age(tmp_path: Path) -> None:
    store = made(tmp_path)
    plain = [store.append(random_rows(5, seed)) for seed in range(3)]
    oldest = written_at(plain[0])
    joined = store.join(plain)
    assert joined is not None
    assert written_at(joined) == oldest
    tokens = [store.append(random_rows(5, seed, with_tokens=True)) for seed in range(3)]
    newest = written_at(tokens[-1])
    joined = store.join(tokens)
    assert joined is not None
    assert written_at(joined) == newest


def test_a_shard_that_another_process_joined_is_left_to_it(tmp_path: Path) -> None:
    store = made(tmp_path)
    shards = [store.append(random_rows(5, seed)) for seed in range(3)]
    store.join(shards[:2])
    before = content(store)
    assert store.join(shards) is None
    assert content(store) == before


def test_a_reader_gets_every_row_while_shards_are_joined(tmp_path: Path) -> None:
    """However often the shard that it reads next has just gone: what it has read, it keeps."""
    store = made(tmp_path)
    for seed in range(12):
        store.append(random_rows(5, seed))
    before, real = content(store), shard_writer.ReferenceStore.shards
    left = [4]

    def joined_after_listing(store: ReferenceStore) -> list[Path]:
        listed = real(store)
        if left[0]:
            left[0] -= 1
            store.join(listed[-2:])
        return listed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_writer.ReferenceStore, "shards", joined_after_listing)
        assert content(store) == before
