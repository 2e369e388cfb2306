"""The cache on disk: what comes back is what was written, or a refusal that says why."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.errors import UserError
from dpo.reference.identity import ReferenceIdentity
from dpo.reference.store import TOLERANCE_PER_TOKEN, Keys, ReferenceStore

IDENTITY = ReferenceIdentity(version=1, weights=("aa",), config={"n_layer": 2}, dtype="float32")


def keys(*values: bytes) -> Keys:
    return np.array([np.void(value.ljust(16, b"\0")) for value in values], dtype="V16")


def made(folder: Path, identity: ReferenceIdentity = IDENTITY) -> ReferenceStore:
    store = ReferenceStore(folder, identity)
    store.create()
    return store


def append(store: ReferenceStore, rows: dict[bytes, tuple[float, int]]) -> Path:
    logps, tokens = zip(*rows.values(), strict=True)
    return store.append(keys(*rows), np.array(logps), np.array(tokens, dtype=np.int32))


def content(store: ReferenceStore) -> dict[bytes, tuple[float, int]]:
    table = store.load()
    # .item() of a fixed-width string drops its trailing zero bytes: read the raw memory instead.
    raw = [table.keys[i : i + 1].tobytes() for i in range(len(table.keys))]
    return {k: (float(v), int(n)) for k, v, n in zip(raw, table.logps, table.num_tokens, strict=True)}


def test_rows_come_back_exactly(tmp_path: Path) -> None:
    store = made(tmp_path)
    append(store, {b"b" * 16: (-1.1, 3), b"a" * 16: (-1e-300, 1)})
    append(store, {b"c" * 16: (-123456.789, 99999)})
    assert content(store) == {b"a" * 16: (-1e-300, 1), b"b" * 16: (-1.1, 3), b"c" * 16: (-123456.789, 99999)}


ROWS = st.dictionaries(
    st.binary(min_size=16, max_size=16),
    st.tuples(st.floats(-1e6, 0), st.integers(1, 2**31 - 1)),
    min_size=1,
    max_size=30,
)


@given(st.lists(ROWS, min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_any_keys_survive_a_round_trip_and_are_found(
    tmp_path_factory: pytest.TempPathFactory, shards: list[dict[bytes, tuple[float, int]]]
) -> None:
    store = made(tmp_path_factory.mktemp("store"))
    whole: dict[bytes, tuple[float, int]] = {}
    for rows in shards:
        fresh = {key: row for key, row in rows.items() if key not in whole}
        whole |= fresh
        if fresh:
            append(store, fresh)
    assert content(store) == whole
    table = store.load()
    rows = table.find(keys(*whole))
    assert [float(value) for value in table.logps[rows]] == [value for value, _ in whole.values()]


def test_keys_that_end_in_zero_bytes_stay_apart(tmp_path: Path) -> None:
    store = made(tmp_path)
    rows = {b"": (-1.0, 1), b"a": (-2.0, 1), b"a\0b": (-3.0, 1), b"\0\0a": (-4.0, 1)}
    append(store, rows)
    assert content(store) == {key.ljust(16, b"\0"): row for key, row in rows.items()}
    found = store.load().find(keys(b"a", b"a\0\0b", b"", b"\0a"))
    assert [store.load().logps[row] if row >= 0 else None for row in found] == [-2.0, None, -1.0, None]


def test_find_gives_minus_one_for_what_is_not_there(tmp_path: Path) -> None:
    store = made(tmp_path)
    assert store.load().find(keys(b"a")).tolist() == [-1]  # an empty cache
    append(store, {b"b": (-1.0, 1), b"d": (-2.0, 1)})
    table = store.load()
    assert table.find(keys(b"a", b"b", b"c", b"d", b"e")).tolist() == [-1, 0, -1, 1, -1]
    assert table.find(keys()).tolist() == []


def test_a_cache_that_was_never_made_is_empty(tmp_path: Path) -> None:
    assert content(ReferenceStore(tmp_path, IDENTITY)) == {}


def test_copies_that_agree_count_once(tmp_path: Path) -> None:
    store = made(tmp_path)
    append(store, {b"a": (-1.0, 10), b"b": (-2.0, 10)})
    append(store, {b"b": (-2.0 - 9e-5, 10), b"c": (-3.0, 10)})  # 10 tokens: up to 1e-4 nats apart
    table = store.load()
    assert len(table.keys) == 3
    assert table.logps[table.find(keys(b"b"))][0] in (-2.0, -2.0 - 9e-5)


@pytest.mark.parametrize("other", [(-2.0 - 1.2e-4, 10), (-2.0, 11)])
def test_copies_that_disagree_are_refused(tmp_path: Path, other: tuple[float, int]) -> None:
    assert TOLERANCE_PER_TOKEN["float32"] == 1e-5
    store = made(tmp_path)
    append(store, {b"a": (-1.0, 1), b"b": (-2.0, 10)})
    append(store, {b"b": other})
    with pytest.raises(UserError, match="1 rows stand in two shards with different values"):
        store.load()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_log_prob_that_is_not_finite_is_refused_and_nothing_stored(tmp_path: Path, value: float) -> None:
    store = made(tmp_path)
    with pytest.raises(UserError, match="1 log-probs that are not finite"):
        append(store, {b"a": (-1.0, 1), b"b": (value, 1)})
    assert content(store) == {}


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReferenceStore, Path, bytes]:
    store = made(tmp_path_factory.mktemp("flip"))
    rng = np.random.default_rng(0)
    path = append(store, {rng.bytes(16): (float(rng.normal()) * 50, int(n)) for n in range(1, 9)})
    return store, path, path.read_bytes()


def test_no_flipped_bit_changes_a_value_unseen(shard: tuple[ReferenceStore, Path, bytes]) -> None:
    store, path, original = shard
    path.write_bytes(original)
    expected, refused = content(store), 0
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            assert content(store) == expected, f"byte {position}"  # a byte that means nothing to a reader
        except UserError:
            refused += 1
    assert refused > len(original) / 2


def test_a_flipped_byte_among_the_values_is_refused(shard: tuple[ReferenceStore, Path, bytes]) -> None:
    store, path, original = shard
    path.write_bytes(original)
    position = original.index(store.load().logps.tobytes()[:8])
    path.write_bytes(original[:position] + bytes([original[position] ^ 4]) + original[position + 1 :])
    with pytest.raises(UserError, match=r"damaged shard .* run precompute-ref again"):
        store.load()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_shard_is_refused(shard: tuple[ReferenceStore, Path, bytes], share: float) -> None:
    store, path, original = shard
    path.write_bytes(original[: int(len(original) * share)])
    with pytest.raises(UserError, match="damaged shard"):
        store.load()


def test_a_shard_with_other_columns_is_refused(tmp_path: Path) -> None:
    store = made(tmp_path)
    pq.write_table(pa.table({"key": ["a"], "value": [1.0]}), store.path / "part-other.parquet")
    with pytest.raises(UserError, match="not a shard of a reference cache"):
        store.load()


def test_a_shard_that_was_being_written_is_not_read(tmp_path: Path) -> None:
    store = made(tmp_path)
    append(store, {b"a": (-1.0, 1)})
    (store.path / ".part-x.parquet.writing").write_bytes(b"half")
    assert len(content(store)) == 1


def test_shards_have_checksums_and_the_documented_columns(tmp_path: Path) -> None:
    path = append(made(tmp_path), {b"a": (-1.0, 1)})
    schema = pq.ParquetFile(path).schema_arrow
    assert schema.names == ["key", "logp", "num_tokens"]
    assert schema.types == [pa.binary(16), pa.float64(), pa.int32()]


def test_the_folder_is_named_by_the_identity(tmp_path: Path) -> None:
    store = made(tmp_path)
    assert store.path == tmp_path / IDENTITY.digest[:16]
    assert json.loads((store.path / "identity.json").read_text()) == IDENTITY.to_json()
    store.create()  # again: the same
    assert [path.name for path in store.path.iterdir()] == ["identity.json"]


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({"weights": ("bb",)}, "weights"),
        ({"config": {"n_layer": 3}}, "config"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_a_foreign_cache_is_refused_with_the_difference(
    tmp_path: Path, change: dict[str, Any], differs: str
) -> None:
    parts = {"version": 1, "weights": ("aa",), "config": {"n_layer": 2}, "dtype": "float32"} | change
    foreign = made(tmp_path, ReferenceIdentity(**parts))
    append(foreign, {b"a": (-1.0, 1)})
    store = ReferenceStore(tmp_path, IDENTITY)
    shutil.move(foreign.path, store.path)
    for attempt in (store.load, store.create):
        with pytest.raises(UserError, match=rf"another reference model, it differs in: {differs}, digest"):
            attempt()


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_shards_without_a_readable_identity_are_refused(tmp_path: Path, text: str | None) -> None:
    store = made(tmp_path)
    append(store, {b"a": (-1.0, 1)})
    identity = store.path / "identity.json"
    identity.unlink() if text is None else identity.write_text(text)
    with pytest.raises(UserError, match=str(store.path)):
        store.load()
