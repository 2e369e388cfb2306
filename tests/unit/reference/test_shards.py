"""One file of the cache: rows are read back exactly, or the error says what is wrong with the file."""

import errno
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path, PurePath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.reference.samples import Values, content, files, made, random_rows, raw, rows, token_rows

from dpo.errors import UserError
from dpo.reference import shards as shards_module
from dpo.reference.shards import (
    IDENTITY,
    SCHEMA,
    UNFINISHED,
    has_token_logps,
    read_shard,
    write_shard,
    written_at,
)
from dpo.reference.table import ReferenceRows

ROOT = Path(__file__).parents[3]
MODEL, OTHER_MODEL = "ab" * 32, "cd" * 32


def assert_equal(found: ReferenceRows, expected: ReferenceRows) -> None:
    assert raw(found.keys) == raw(expected.keys)
    for name in ("logps", "num_tokens", "token_logps"):
        values, wanted = getattr(found, name), getattr(expected, name)
        assert (values is None) == (wanted is None), name
        assert values is None or (values.dtype, values.tolist()) == (wanted.dtype, wanted.tolist()), name


ROWS = st.dictionaries(
    st.binary(min_size=16, max_size=16),
    st.tuples(st.floats(-1e300, 0), st.integers(1, 2**31 - 1)),
    min_size=1,
    max_size=30,
)
TOKENS = st.dictionaries(
    st.binary(min_size=16, max_size=16),
    st.lists(st.floats(-(2.0**100), 0, width=32), min_size=1, max_size=8),
    min_size=1,
    max_size=10,
)


@given(values=ROWS)
@settings(max_examples=30, deadline=None)
def test_rows_are_read_back_in_order_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, values: Values
) -> None:
    path = write_shard(tmp_path_factory.mktemp("shard"), rows(values), MODEL)
    assert_equal(read_shard(path, MODEL), rows(values))


@given(values=TOKENS)
@settings(max_examples=30, deadline=None)
def test_token_log_probs_are_read_back_when_they_are_asked_for(
    tmp_path_factory: pytest.TempPathFactory, values: dict[bytes, list[float]]
) -> None:
    written = token_rows(values)
    path = write_shard(tmp_path_factory.mktemp("shard"), written, MODEL)
    assert_equal(read_shard(path, MODEL, token_logps=True), written)
    assert_equal(read_shard(path, MODEL), replace(written, token_logps=None))


def test_a_shard_larger_than_a_page_is_read_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    number = 300_000  # of 16, 8 and 4 bytes: several pages of each column
    written = ReferenceRows(
        keys=np.frombuffer(rng.bytes(16 * number), dtype="V16"),
        logps=rng.normal(-50, 9, number),
        num_tokens=rng.integers(1, 4, number, dtype=np.int32),
    )
    tokens = rng.normal(-3, 1, int(written.num_tokens.sum())).astype(np.float32)
    found = read_shard(
        write_shard(tmp_path, replace(written, token_logps=tokens), MODEL), MODEL, token_logps=True
    )
    assert found.keys.tobytes() == written.keys.tobytes()
    assert np.array_equal(found.logps, written.logps)
    assert np.array_equal(found.num_tokens, written.num_tokens)
    assert found.token_logps is not None
    assert np.array_equal(found.token_logps, tokens)


def test_a_shard_without_tokens_gives_none_when_they_are_asked_for(tmp_path: Path) -> None:
    path = write_shard(tmp_path, random_rows(3), MODEL)
    assert read_shard(path, MODEL, token_logps=True).token_logps is None


def test_the_columns_are_the_documented_ones_and_the_model_is_named(tmp_path: Path) -> None:
    with pq.ParquetFile(write_shard(tmp_path, random_rows(3), MODEL)) as file:
        assert file.schema_arrow.names == ["key", "logp", "num_tokens"]
        assert file.schema_arrow.types == [pa.binary(16), pa.float64(), pa.int32()]
        assert file.metadata.metadata[b"dpo.reference.identity"] == MODEL.encode()
    with pq.ParquetFile(write_shard(tmp_path, random_rows(3, with_tokens=True), MODEL)) as file:
        assert file.schema_arrow.field("token_logps").type == pa.list_(pa.float32())


def test_names_sort_by_time_and_contain_it(tmp_path: Path) -> None:
    times = (1_700_000_000_000_000_000, 5, 99, 10**18)
    written = {write_shard(tmp_path, random_rows(1), MODEL, time_ns=time): time for time in times}
    assert [written_at(path) for path in sorted(written)] == sorted(times)
    assert all(written_at(path) == time for path, time in written.items())
    again = write_shard(tmp_path, random_rows(1), MODEL, time_ns=5)
    assert again not in written  # the same time, another file
    now = write_shard(tmp_path, random_rows(1), MODEL)
    assert now.name > max(path.name for path in written)
    assert written_at(Path("part-mine.parquet")) == 0


def test_whether_a_shard_has_tokens_is_read_from_it(tmp_path: Path) -> None:
    assert not has_token_logps(write_shard(tmp_path, random_rows(2), MODEL))
    path = write_shard(tmp_path, random_rows(2, with_tokens=True), MODEL)
    assert has_token_logps(path)
    path.write_bytes(path.read_bytes()[:-9])
    assert has_token_logps(path)  # so that it is read, which says what is wrong
    path.unlink()
    with pytest.raises(FileNotFoundError):
        has_token_logps(path)


@pytest.fixture(scope="module", params=[False, True], ids=["sums", "tokens"])
def shard(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bytes, ReferenceRows]:
    """(path, its bytes, its rows); a test may overwrite the file."""
    expected = random_rows(12, with_tokens=request.param)
    path = write_shard(tmp_path_factory.mktemp("flip"), expected, MODEL)
    return path, path.read_bytes(), expected


Shard = tuple[Path, bytes, ReferenceRows]


def test_no_flipped_bit_changes_a_value_unnoticed(shard: Shard) -> None:
    path, original, expected = shard
    refused = 0
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            found = read_shard(path, MODEL, token_logps=True)
        except UserError:
            refused += 1
            continue
        if found.token_logps is None:  # the column has another name now, as if it were not stored
            found = replace(found, token_logps=expected.token_logps)
        assert_equal(found, expected)  # a byte that no reader uses
    assert refused > len(original) / 2


def test_a_flipped_byte_among_the_values_is_found_by_the_page_checksum(tmp_path: Path) -> None:
    expected = random_rows(200)
    path = write_shard(tmp_path, expected, MODEL)
    original = path.read_bytes()
    lowest_bytes = expected.logps.view(np.uint8).reshape(-1, 8)[:, 0].tobytes()  # byte streams are split
    position = original.index(lowest_bytes[:64])
    path.write_bytes(original[:position] + bytes([original[position] ^ 4]) + original[position + 1 :])
    unchecked = pq.read_table(path)["logp"].to_numpy()  # only a checksum finds it
    assert np.flatnonzero(unchecked != expected.logps).tolist() == [0]
    with pytest.raises(UserError, match=rf"{path}: damaged shard"):
        read_shard(path, MODEL)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_shard_is_refused(shard: Shard, share: float) -> None:
    path, original, _ = shard
    path.write_bytes(original[: int(len(original) * share)])
    with pytest.raises(UserError, match=rf"^{path}: damaged shard"):
        read_shard(path, MODEL)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_log_prob_that_is_not_finite_is_refused_when_it_is_read(tmp_path: Path, value: float) -> None:
    path = write_shard(tmp_path, rows({b"a": (-1.0, 1), b"b": (value, 1)}), MODEL)
    with pytest.raises(UserError, match=rf"{path}: damaged shard \(1 "):
        read_shard(path, MODEL)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_token_log_prob_that_is_not_finite_is_refused_too(tmp_path: Path, value: float) -> None:
    sums = rows({b"a": (-1.0, 1), b"b": (-2.0, 2)})
    tokens = np.array([-1.0, value, -1.0], dtype=np.float32)
    path = write_shard(tmp_path, replace(sums, token_logps=tokens), MODEL)
    with pytest.raises(UserError, match="damaged shard"):
        read_shard(path, MODEL, token_logps=True)


def by_hand(folder: Path, arrays: list[pa.Array], schema: pa.Schema = SCHEMA) -> Path:
    """A well-formed Parquet file that our writer would not write."""
    path = folder / "part-hand.parquet"
    pq.write_table(pa.table(arrays, schema=schema.with_metadata({IDENTITY: MODEL})), path)
    return path


KEY = pa.array([b"k" * 16, b"l" * 16], pa.binary(16))


def test_a_file_by_another_writer_is_read_if_it_is_complete(tmp_path: Path) -> None:
    found = read_shard(by_hand(tmp_path, [KEY, pa.array([-1.0, -2.0]), pa.array([1, 2], pa.int32())]), MODEL)
    assert_equal(found, rows({b"k" * 16: (-1.0, 1), b"l" * 16: (-2.0, 2)}))
    empty = by_hand(tmp_path, [KEY[:0], pa.array([], pa.float64()), pa.array([], pa.int32())])
    assert len(read_shard(empty, MODEL)) == 0


def test_an_empty_cell_is_refused(tmp_path: Path) -> None:
    path = by_hand(tmp_path, [KEY, pa.array([-1.0, None]), pa.array([1, 2], pa.int32())])
    with pytest.raises(UserError, match=rf"{path}: damaged shard"):
        read_shard(path, MODEL)


def test_an_empty_cell_among_the_token_log_probs_is_refused(tmp_path: Path) -> None:
    lists = pa.array([[-1.0], [-1.0, None]], pa.list_(pa.float32()))
    arrays = [KEY, pa.array([-1.0, -2.0]), pa.array([1, 2], pa.int32()), lists]
    path = by_hand(tmp_path, arrays, SCHEMA.append(shards_module.TOKENS))
    with pytest.raises(UserError, match=rf"{path}: damaged shard \(it has empty cells"):
        read_shard(path, MODEL, token_logps=True)


def test_rows_without_tokens_have_no_token_log_probs(tmp_path: Path) -> None:
    lists = pa.array([[], []], pa.list_(pa.float32()))
    arrays = [KEY, pa.array([0.0, 0.0]), pa.array([0, 0], pa.int32()), lists]
    path = by_hand(tmp_path, arrays, SCHEMA.append(shards_module.TOKENS))
    found = read_shard(path, MODEL, token_logps=True).token_logps
    assert found is not None
    assert (found.dtype, len(found)) == (np.float32, 0)


WITHOUT_PANDAS = """
import sys
from pathlib import Path
import numpy as np
from dpo.reference.shards import read_shard, write_shard
from dpo.reference.table import ReferenceRows
keys = np.frombuffer(b"k" * 32, "V16")
rows = ReferenceRows(keys=keys, logps=np.array([-1.0, -2.0]), num_tokens=np.array([1, 1], np.int32),
                     token_logps=np.array([-1.0, -2.0], np.float32))
read_shard(write_shard(Path(sys.argv[1]), rows, "model"), "model", token_logps=True)
assert "pandas" not in sys.modules
"""


def test_pandas_is_not_imported_to_read_or_write_a_shard(tmp_path: Path) -> None:
    """It takes 0.3 s, and pyarrow imports it to convert arrays."""
    subprocess.run([sys.executable, "-c", WITHOUT_PANDAS, str(tmp_path)], check=True, cwd=ROOT)


def test_another_number_of_token_log_probs_than_of_tokens_is_refused(tmp_path: Path) -> None:
    lists = pa.array([[-1.0], [-1.0]], pa.list_(pa.float32()))
    arrays = [KEY, pa.array([-1.0, -2.0]), pa.array([1, 2], pa.int32()), lists]
    path = by_hand(tmp_path, arrays, SCHEMA.append(shards_module.TOKENS))
    assert len(read_shard(path, MODEL)) == 2
    with pytest.raises(UserError, match=rf"{path}: damaged shard"):
        read_shard(path, MODEL, token_logps=True)


@pytest.mark.parametrize(
    "column",
    [pa.array(["a", "b"]), pa.array([1.0, 2.0]), pa.array([{"list": [1.0]}, {"list": [2.0, 3.0]}])],
    ids=["text", "numbers", "a struct, as a flipped bit makes it"],
)
def test_token_log_probs_that_are_not_lists_are_refused(tmp_path: Path, column: pa.Array) -> None:
    arrays = [KEY, pa.array([-1.0, -2.0]), pa.array([1, 2], pa.int32()), column]
    path = by_hand(tmp_path, arrays, SCHEMA.append(pa.field("token_logps", column.type)))
    with pytest.raises(UserError, match=str(path)):
        read_shard(path, MODEL, token_logps=True)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"key": ["a"], "value": [1.0]}),
        pa.table({"key": ["a"], "logp": [1.0], "num_tokens": [1]}),
        pa.table({"logp": [1.0], "num_tokens": pa.array([1], pa.int32()), "key": KEY[:1]}),
        pa.table(
            {"key": KEY[:1], "logp": pa.array([1.0], pa.float32()), "num_tokens": pa.array([1], pa.int32())}
        ),
    ],
    ids=["other names", "other types", "another order", "less precision"],
)
def test_a_file_with_other_columns_is_refused_with_ours(tmp_path: Path, table: pa.Table) -> None:
    pq.write_table(table, tmp_path / "part-other.parquet")
    with pytest.raises(UserError, match=r"part-other\.parquet: .* key \(fixed_size_binary\[16\]\), logp"):
        read_shard(tmp_path / "part-other.parquet", MODEL)


def test_a_shard_of_another_model_is_refused_with_both_names(tmp_path: Path) -> None:
    path = write_shard(tmp_path, random_rows(3), OTHER_MODEL)
    assert len(read_shard(path, OTHER_MODEL)) == 3
    with pytest.raises(UserError, match=rf"^{path}: .*{OTHER_MODEL[:16]}.*{MODEL[:16]}"):
        read_shard(path, MODEL)


def test_a_shard_that_does_not_name_its_model_is_refused(tmp_path: Path) -> None:
    table = pa.table([KEY, pa.array([-1.0, -2.0]), pa.array([1, 2], pa.int32())], schema=SCHEMA)
    pq.write_table(table, tmp_path / "part-x.parquet")
    with pytest.raises(UserError, match="identity unknown"):
        read_shard(tmp_path / "part-x.parquet", MODEL)


def test_a_shard_that_is_gone_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_shard(tmp_path / "part-gone.parquet", MODEL)


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "No space left"), (errno.EIO, "Input/output")])
def test_a_full_disk_is_reported_and_leaves_the_cache_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    store = made(tmp_path)
    store.append(rows({b"a": (-1.0, 1)}))
    before = files(store.path)

    def full(_: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=rf"{store.path}: .* 2 rows \({said}"):
            store.append(rows({b"b": (-2.0, 1), b"c": (-3.0, 1)}))
    assert files(store.path) == before
    store.append(rows({b"b": (-2.0, 1)}))  # there is free space again
    assert len(content(store)) == 2


def test_a_folder_that_is_gone_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone: .*No such file or directory"):
        write_shard(tmp_path / "gone", random_rows(1), MODEL)


def test_a_shard_is_on_the_disk_before_it_has_its_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[list[str]] = []
    fsync = os.fsync

    def noting(descriptor: int) -> None:
        flushed.append([path.name for path in tmp_path.iterdir()])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noting)
    path = write_shard(tmp_path, random_rows(1), MODEL)
    (temporary,), final = flushed  # the file, then the folder
    assert final == [path.name]
    assert temporary.startswith(f".{path.name}.")
    assert PurePath(temporary).match(UNFINISHED)
