"""Maintenance of a cache: no value in use changes or is lost, and every damaged file is named."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.reference.samples import (
    IDENTITY,
    Values,
    append,
    content,
    files,
    keys,
    made,
    number_of_rows,
    padded,
    random_rows,
    raw,
    rows,
    token_rows,
    tokens_in_use,
)

from dpo.errors import UserError
from dpo.reference import prune as prune_module
from dpo.reference.prune import ABANDONED_SECONDS, cache_info, prune, verify
from dpo.reference.shards import has_token_logps, read_shard, write_shard
from dpo.reference.store import ReferenceStore
from dpo.reference.table import KeyIndex, index_keys


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return made(tmp_path)


def wanting(*names: bytes) -> KeyIndex:
    return index_keys(keys(*names))[0]


def leave_unfinished(store: ReferenceStore, name: str, *, age: float = 0.0) -> Path:
    path = store.path / f".part-{name}.parquet.writing"
    path.write_bytes(b"half")
    then = path.stat().st_mtime - age
    os.utime(path, (then, then))
    return path


def test_the_statistics_of_a_cache(store: ReferenceStore) -> None:
    append(store, {b"a": (-1.0, 1), b"b": (-3.0, 2)})
    append(store, {b"b": (-3.0, 2), b"c": (-4.0, 1)})
    store.append(token_rows({b"b": [-1.0, -2.0], b"d": [-5.0]}))
    leave_unfinished(store, "x")
    info = cache_info(store)
    assert (info.rows, info.copies, info.rows_with_tokens) == (4, 2, 2)
    assert (info.shards, info.unfinished) == (3, 1)
    assert info.bytes == sum(path.stat().st_size for path in store.shards())


def test_the_statistics_of_an_empty_cache(store: ReferenceStore) -> None:
    info = cache_info(store)
    assert (info.rows, info.copies, info.rows_with_tokens, info.shards, info.bytes) == (0, 0, 0, 0, 0)
    assert verify(store) == 0


def test_verify_counts_the_rows_of_an_undamaged_cache(store: ReferenceStore) -> None:
    append(store, {b"a": (-1.0, 1), b"b": (-3.0, 2)})
    store.append(token_rows({b"b": [-1.0, -2.0], b"d": [-5.0]}))
    assert verify(store) == 3


def test_all_bad_shards_are_named_each_with_its_own_reason(store: ReferenceStore) -> None:
    good, damaged, cut, other = (store.append(random_rows(50, seed, with_tokens=True)) for seed in range(4))
    content_of = bytearray(damaged.read_bytes())
    content_of[len(content_of) // 3] ^= 1
    damaged.write_bytes(content_of)
    cut.write_bytes(cut.read_bytes()[:-9])
    other.unlink()
    other = write_shard(store.path, random_rows(5), "cd" * 32)
    with pytest.raises(UserError) as raised:
        verify(store)
    first, *lines = str(raised.value).splitlines()
    assert first.startswith("3 of 4 shards")
    assert [line.partition(": ")[0].strip() for line in lines] == [str(p) for p in (damaged, cut, other)]
    reasons = ("damaged shard", "damaged shard", "a shard of another reference model")
    assert all(reason in line for reason, line in zip(reasons, lines, strict=True))
    assert str(good) not in str(raised.value)


def test_damage_among_the_tokens_is_found(store: ReferenceStore) -> None:
    tokens = np.random.default_rng(0).normal(-3, 1, 4000).astype(np.float32)
    path = store.append(token_rows({b"a": tokens.tolist()}))
    damaged = bytearray(path.read_bytes())
    plane = tokens.view(np.uint8).reshape(-1, 4)[:, 0].tobytes()  # byte streams are split
    damaged[damaged.index(plane[:64])] ^= 1
    path.write_bytes(damaged)
    assert len(read_shard(path, IDENTITY.digest)) == 1  # the sums are undamaged
    with pytest.raises(UserError, match=str(path)):
        verify(store)


def test_rows_that_disagree_are_found(store: ReferenceStore) -> None:
    append(store, {b"a": (-1.0, 1)})
    append(store, {b"a": (-2.0, 1)})
    with pytest.raises(UserError, match=rf"{store.path}: 1 rows "):
        verify(store)


def test_small_shards_are_joined_and_values_in_use_stay(store: ReferenceStore) -> None:
    append(store, {b"a": (-1.0, 1), b"b": (-3.00001, 2)})
    append(store, {b"c": (-4.0, 1), b"b": (-3.0, 2)})
    append(store, {b"d": (-7.0, 1), b"a": (-1.00001, 1)})
    before, size = content(store), sum(path.stat().st_size for path in store.shards())
    result = prune(store, None, dry_run=False)
    assert (result.rows, result.kept, len(result.replaced), result.bytes) == (6, 4, 3, size)
    assert content(store) == before
    assert before == padded({b"a": (-1.0, 1), b"b": (-3.00001, 2), b"c": (-4.0, 1), b"d": (-7.0, 1)})
    assert (len(store.shards()), number_of_rows(store)) == (1, 4)


def test_sums_in_use_and_tokens_in_use_stay_even_if_they_are_in_different_copies(
    store: ReferenceStore,
) -> None:
    tiny = 2.0**-18
    append(store, {b"a": (-3.0, 2), b"x": (-9.0, 1)})  # in use for its sum
    store.append(token_rows({b"a": [-1.0, -2.0 - tiny], b"y": [-5.0]}))  # in use for its tokens
    store.append(token_rows({b"a": [-1.0, -2.0 + tiny], b"z": [-6.0]}))
    append(store, {b"z": (-6.0 + tiny, 1), b"w": (-7.0, 1)})
    sums, tokens = content(store), tokens_in_use(store)
    result = prune(store, None, dry_run=False)
    assert (result.rows, result.kept) == (8, 6)  # a is there twice
    assert (content(store), tokens_in_use(store)) == (sums, tokens)
    assert [has_token_logps(path) for path in store.shards()] == [False, True]


SHARDS = st.lists(
    st.tuples(
        st.booleans(),  # with tokens
        st.dictionaries(st.integers(0, 9), st.integers(-2, 2), min_size=1, max_size=6),  # key -> rounding
    ),
    min_size=1,
    max_size=6,
)
KEPT = st.one_of(st.none(), st.sets(st.integers(0, 9)))


@given(SHARDS, KEPT, st.integers(1, 5), st.integers(1, 6))
@settings(max_examples=100, deadline=None)
def test_pruning_changes_no_value_that_is_wanted(
    tmp_path_factory: pytest.TempPathFactory,
    shards: list[tuple[bool, dict[int, int]]],
    kept: set[int] | None,
    small: int,
    large: int,
) -> None:
    store = made(tmp_path_factory.mktemp("prune"))
    for number, (with_tokens, values) in enumerate(shards):
        made_of = {b"k%d" % key: [-float(key), rounding * 2.0**-18] for key, rounding in values.items()}
        sums: Values = {key: (float(sum(tokens)), 2) for key, tokens in made_of.items()}
        shard = token_rows(made_of) if with_tokens else rows(sums)
        write_shard(store.path, shard, IDENTITY.digest, time_ns=number + 1)
    wanted = raw(keys(*(b"k%d" % key for key in (range(10) if kept is None else sorted(kept)))))
    sums_before = {key: value for key, value in content(store).items() if key in wanted}
    tokens_before = {key: value for key, value in tokens_in_use(store).items() if key in wanted}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prune_module, "SMALL_SHARD_ROWS", small)
        patch.setattr(prune_module, "LARGE_SHARD_ROWS", large)
        result = prune(store, None if kept is None else index_keys(keys(*wanted))[0], dry_run=False)
        assert content(store) == sums_before
        assert tokens_in_use(store) == tokens_before
        assert number_of_rows(store) == result.kept
        again = prune(store, None if kept is None else index_keys(keys(*wanted))[0], dry_run=False)
        assert (again.rows, again.kept) == (result.kept, result.kept)
        assert (content(store), tokens_in_use(store)) == (sums_before, tokens_before)


def test_only_rows_that_are_not_wanted_are_dropped(store: ReferenceStore) -> None:
    append(store, {b"a": (-1.0, 1), b"b": (-2.0, 1)})
    append(store, {b"c": (-3.0, 1), b"d": (-4.0, 1)})
    store.append(token_rows({b"e": [-1.0, -2.0], b"f": [-5.0]}))
    result = prune(store, wanting(b"a", b"d", b"f", b"not there"), dry_run=False)
    assert (result.rows, result.kept) == (6, 3)
    assert content(store) == padded({b"a": (-1.0, 1), b"d": (-4.0, 1), b"f": (-5.0, 1)})
    assert tokens_in_use(store) == {raw(keys(b"f"))[0]: [-5.0]}


def test_if_no_row_is_wanted_only_the_identity_stays(store: ReferenceStore) -> None:
    append(store, {b"a": (-1.0, 1), b"b": (-2.0, 1)})
    assert prune(store, wanting(), dry_run=False).kept == 0
    assert list(files(store.path)) == ["identity.json"]


def test_large_shards_are_kept_unless_they_lose_rows(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune_module, "SMALL_SHARD_ROWS", 3)
    large = append(store, {b"a": (-1.0, 1), b"b": (-2.0, 1), b"c": (-3.0, 1)})
    small = [append(store, {name: (-4.0, 1)}) for name in (b"d", b"e")]
    before = large.read_bytes()
    assert prune(store, None, dry_run=False).replaced == tuple(small)
    assert large.read_bytes() == before
    assert len(store.shards()) == 2
    assert prune(store, None, dry_run=False).replaced == ()  # a single small shard has no partner
    assert prune(store, wanting(b"a", b"b", b"d", b"e"), dry_run=False).replaced[0] == large
    assert len(content(store)) == 4


def test_joined_shards_end_at_the_size_of_a_large_shard(
    store: ReferenceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prune_module, "LARGE_SHARD_ROWS", 10)
    for seed in range(9):
        store.append(random_rows(4, seed))
    before = content(store)
    prune(store, None, dry_run=False)
    assert [len(read_shard(path, IDENTITY.digest)) for path in store.shards()] == [12, 12, 12]
    assert content(store) == before


def test_a_dry_run_returns_the_same_and_changes_nothing(store: ReferenceStore) -> None:
    append(store, {b"a": (-1.0, 1), b"b": (-2.0, 1)})
    append(store, {b"b": (-2.0, 1), b"c": (-3.0, 1)})
    leave_unfinished(store, "old", age=2 * ABANDONED_SECONDS)
    before, wanted = files(store.path), wanting(b"a", b"b")
    planned = prune(store, wanted, dry_run=True)
    assert files(store.path) == before
    assert planned == prune(store, wanted, dry_run=False)
    assert files(store.path) != before


def test_unfinished_files_are_removed_once_they_are_old(store: ReferenceStore) -> None:
    append(store, {b"a": (-1.0, 1)})
    old = leave_unfinished(store, "old", age=ABANDONED_SECONDS + 60)
    new = leave_unfinished(store, "new", age=ABANDONED_SECONDS - 60)
    prune(store, None, dry_run=False)
    assert (old.exists(), new.exists()) == (False, True)
    assert len(content(store)) == 1


def test_one_small_shard_of_each_kind_is_kept(store: ReferenceStore) -> None:
    append(store, {b"a": (-1.0, 1)})
    store.append(token_rows({b"b": (-2.0, 2)}))
    assert prune(store, None, dry_run=False).replaced == ()
    append(store, {b"c": (-3.0, 1)})
    assert len(prune(store, None, dry_run=False).replaced) == 2
    assert prune(store, None, dry_run=False).replaced == ()
