"""One Parquet file of the cache. A crash leaves a complete shard or none, and damage is found on reading.

Columns: key (16 bytes), logp (float64, nats), num_tokens (int32) and, when asked for, token_logps (list of
float32). The file's metadata names the identity of the model that computed it.
"""

import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dpo.data.records import KEY_BYTES
from dpo.errors import UserError
from dpo.files import write_file
from dpo.reference.table import ReferenceRows

SCHEMA = pa.schema([("key", pa.binary(KEY_BYTES)), ("logp", pa.float64()), ("num_tokens", pa.int32())])
TOKENS = pa.field("token_logps", pa.list_(pa.float32()))
DTYPES = {
    pa.binary(KEY_BYTES): np.dtype(f"V{KEY_BYTES}"),
    pa.float64(): np.dtype(np.float64),
    pa.float32(): np.dtype(np.float32),
    pa.int32(): np.dtype(np.int32),
}
"""Types of columns, as they lie in memory."""
IDENTITY = b"dpo.reference.identity"
PATTERN = "part-*.parquet"
UNFINISHED = ".part-*.writing"
"""Temporary names that `dpo.files.write_file` gives to shards."""


def write_shard(folder: Path, rows: ReferenceRows, identity: str, *, time_ns: int | None = None) -> Path:
    """Writes a shard, complete and flushed to the disk before it has its name.

    The name begins with the time of writing, so that shards sort by age.

    Args:
        folder: The cache's folder.
        rows: At least one.
        identity: Digest of the model's identity.
        time_ns: When the rows were computed, in nanoseconds since 1970. Default: now.

    Raises:
        UserError: The disk is full, or the folder cannot be written.
    """
    stamp = time.time_ns() if time_ns is None else time_ns
    path = folder / f"part-{stamp:020d}-{uuid.uuid4().hex[:12]}.parquet"
    try:
        write_file(path, _encoded(rows, identity))
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write a shard of {len(rows)} rows ({error.strerror}); the shards before it "
            "are kept. Free space or fix the permissions, and run precompute-ref again: it computes what "
            "is missing"
        ) from error
    return path


def read_shard(path: Path, identity: str, *, token_logps: bool = False) -> ReferenceRows:
    """Reads a shard and checks its checksums, columns, identity and values.

    Args:
        path: The file.
        identity: Digest of the identity that it must have.
        token_logps: Also read the log-probs per token; None for a shard without them.

    Raises:
        UserError: Damaged, not a shard, or of another model.
        FileNotFoundError: It is gone: another process pruned the cache.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
            if [*schema][: len(SCHEMA)] != [*SCHEMA]:
                columns = ", ".join(f"{field.name} ({field.type})" for field in SCHEMA)
                raise UserError(f"{path}: not a shard of a reference cache; expected the columns {columns}")
            with_tokens = token_logps and TOKENS.name in schema.names
            if with_tokens and not _is_token_column(schema.field(TOKENS.name).type):
                raise _damaged(path, f"{TOKENS.name} is {schema.field(TOKENS.name).type}, not {TOKENS.type}")
            table = file.read(columns=[*SCHEMA.names, *([TOKENS.name] if with_tokens else [])])
            found = (file.metadata.metadata or {}).get(IDENTITY, b"").decode()
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: names that are not UTF-8
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _damaged(path, reason) from error
    if table.num_rows != num_rows:
        raise _damaged(path, f"it has {table.num_rows} of {num_rows} rows")
    if found != identity:
        raise UserError(
            f"{path}: a shard of another reference model (identity {found[:16] or 'unknown'}, this cache is "
            f"{identity[:16]}); move it out of the folder"
        )
    return _decoded(path, table)


def written_at(path: Path) -> int:
    """The time in a shard's name, in nanoseconds since 1970; 0 if the name has none."""
    time_ns = path.name.split("-")[1]
    return int(time_ns) if time_ns.isdigit() else 0


def has_token_logps(path: Path) -> bool:
    """Whether a shard holds log-probs per token. True for a shard that cannot be read: reading it raises the
    error that says why.
    """
    try:
        return TOKENS.name in pq.read_schema(path).names
    except FileNotFoundError:
        raise
    except (OSError, ValueError, pa.ArrowException):
        return True


def _encoded(rows: ReferenceRows, identity: str) -> pa.Buffer:
    columns: tuple[npt.NDArray[Any], ...] = (rows.keys, rows.logps, rows.num_tokens)
    arrays = [_column(values, field.type) for values, field in zip(columns, SCHEMA, strict=True)]
    schema, split = SCHEMA, ["logp"]
    if rows.token_logps is not None:
        offsets = np.concatenate([[0], np.cumsum(rows.num_tokens)]).astype(np.int32)
        values = _column(rows.token_logps, pa.float32())
        arrays.append(pa.ListArray.from_arrays(_column(offsets, pa.int32()), values))
        schema, split = schema.append(TOKENS), [*split, f"{TOKENS.name}.list.element"]
    table = pa.table(arrays, schema=schema.with_metadata({IDENTITY: identity}))
    sink = pa.BufferOutputStream()
    pq.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=["num_tokens"],
        use_byte_stream_split=split,
        write_statistics=False,
        write_page_checksum=True,
    )
    return sink.getvalue()


def _decoded(path: Path, table: pa.Table) -> ReferenceRows:
    table = table.combine_chunks()
    if any(column.null_count for column in table.columns):
        raise _damaged(path, "it has empty cells")
    columns = [column.chunk(0) if table.num_rows else pa.nulls(0, column.type) for column in table.columns]
    keys, logps, num_tokens = map(_values, columns[: len(SCHEMA)])
    tokens = [_tokens_of(path, lists, num_tokens) for lists in columns[len(SCHEMA) :]]
    rows = ReferenceRows(keys=keys, logps=logps, num_tokens=num_tokens, token_logps=next(iter(tokens), None))
    if not np.isfinite(rows.logps).all():
        raise _damaged(path, f"{int((~np.isfinite(rows.logps)).sum())} log-probs are not finite")
    return rows


def _tokens_of(path: Path, lists: pa.ListArray, num_tokens: npt.NDArray[np.int32]) -> npt.NDArray[Any]:
    if not np.array_equal(np.diff(_values(lists.offsets)), num_tokens):
        raise _damaged(path, "a row's number of token log-probs is not its number of tokens")
    flat = lists.flatten()
    if flat.null_count:
        raise _damaged(path, "it has empty cells")
    values = _values(flat)
    if not np.isfinite(values).all():
        raise _damaged(path, f"{int((~np.isfinite(values)).sum())} token log-probs are not finite")
    return values


def _column(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
    """The values as they lie in memory; `pa.array` would import pandas first, which takes 0.3 s."""
    packed = pa.py_buffer(np.ascontiguousarray(values, DTYPES[kind]).view(np.uint8))
    return pa.Array.from_buffers(kind, len(values), [None, packed])


def _values(array: pa.Array) -> npt.NDArray[Any]:
    """The values of an array without empty cells, as they lie in memory; see `_column`."""
    if not len(array):
        return np.zeros(0, DTYPES[array.type])
    return np.frombuffer(array.buffers()[1], DTYPES[array.type])[array.offset :][: len(array)]


def _is_token_column(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) and kind.value_type == pa.float32())


def _damaged(path: Path, reason: str) -> UserError:
    return UserError(f"{path}: damaged shard ({reason}); delete it and run precompute-ref again")
