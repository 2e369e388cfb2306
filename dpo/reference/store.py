"""The reference cache on disk: identity.json and append-only Parquet shards of one row a sequence.

Shards are immutable, have unique names and may overlap; the loaded table has each key once. A shard is
written under a temporary name, flushed and renamed, so that a crash loses at most the shard being written.
"""

import json
import os
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dpo.errors import UserError
from dpo.records import KEY_BYTES
from dpo.reference.identity import ReferenceIdentity

TOLERANCE_PER_TOKEN = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest difference, in nats a token, between two computations of one sequence in different batches."""

SCHEMA = pa.schema([("key", pa.binary(KEY_BYTES)), ("logp", pa.float64()), ("num_tokens", pa.int32())])

Keys = npt.NDArray[np.void]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceTable:
    """The rows of a cache, sorted by key, each key once."""

    keys: npt.NDArray[np.bytes_]
    """(N,) S16, ascending."""
    logps: npt.NDArray[np.float64]
    """(N,) summed log-prob of the completion, in nats."""
    num_tokens: npt.NDArray[np.int32]
    """(N,) completion tokens."""

    def find(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Row of each key, or -1.

        Args:
            keys: (M,) V16.
        """
        wanted = _sortable(keys)
        if len(self.keys) == 0:
            return np.full(len(wanted), -1, dtype=np.int64)
        rows = np.searchsorted(self.keys, wanted).clip(max=len(self.keys) - 1)
        return np.where(self.keys[rows] == wanted, rows, -1)


class ReferenceStore:
    """One model's cache: the folder CACHE_DIR/<first 16 digits of its identity>."""

    def __init__(self, cache_dir: Path, identity: ReferenceIdentity) -> None:
        self.identity = identity
        self.path = cache_dir / identity.digest[:16]

    def create(self) -> None:
        """Makes the folder and identity.json; refuses a folder of another identity."""
        self.path.mkdir(parents=True, exist_ok=True)
        file = self.path / "identity.json"
        if not file.is_file():
            temporary = self.path / f"identity.json.{os.getpid()}"
            temporary.write_text(json.dumps(self.identity.to_json(), indent=2))
            temporary.replace(file)
        self._check_identity()

    def append(self, keys: Keys, logps: npt.NDArray[np.float64], num_tokens: npt.NDArray[np.int32]) -> Path:
        """Writes one shard and returns its path.

        Args:
            keys: (N,) V16.
            logps: (N,) nats; refused if any is not finite.
            num_tokens: (N,).

        Raises:
            UserError: A log-prob is NaN or infinite: the model is broken, and so would be every loss.
        """
        if not np.isfinite(logps).all():
            raise UserError(
                f"{self.path}: the model gave {int((~np.isfinite(logps)).sum())} log-probs that are "
                "not finite; nothing of this batch was stored. Check the weights, or set model.dtype: float32"
            )
        packed = pa.py_buffer(np.ascontiguousarray(keys).tobytes())
        columns = [pa.FixedSizeBinaryArray.from_buffers(SCHEMA.field("key").type, len(keys), [None, packed])]
        columns += [pa.array(logps), pa.array(num_tokens)]
        table = pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
        name = f"part-{uuid.uuid4().hex}.parquet"
        temporary = self.path / f".{name}.writing"
        with temporary.open("wb") as file:
            pq.write_table(table, file, write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)
        _flush_directory(self.path)
        return self.path / name

    def load(self) -> ReferenceTable:
        """All shards as one table; empty if there is no cache yet.

        Raises:
            UserError: A shard is damaged, the folder has another identity, or two shards disagree on a row.
        """
        shards = sorted(self.path.glob("part-*.parquet"))
        if shards:
            self._check_identity()
        tables = [_read_shard(shard) for shard in shards]
        table = pa.concat_tables(tables) if tables else SCHEMA.empty_table()
        keys = _sortable(_keys_of(table))
        logps, num_tokens = table["logp"].to_numpy(), table["num_tokens"].to_numpy()
        order = np.argsort(keys, kind="stable")
        keys, logps, num_tokens = keys[order], logps[order], num_tokens[order]
        first = np.ones(len(keys), dtype=bool)
        first[1:] = keys[1:] != keys[:-1]
        self._check_agreement(first, logps, num_tokens)
        return ReferenceTable(keys=keys[first], logps=logps[first], num_tokens=num_tokens[first])

    def _check_identity(self) -> None:
        file = self.path / "identity.json"
        try:
            stored = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{file}: missing or not JSON ({error}); delete the folder and recompute it"
            ) from error
        wanted = self.identity.to_json()
        if stored != wanted:
            given = stored if isinstance(stored, dict) else {}
            differing = ", ".join(key for key in wanted if given.get(key) != wanted[key])
            raise UserError(
                f"{self.path}: the cache is of another reference model, it differs in: {differing}; delete "
                "the folder, or use another reference.cache_dir"
            )

    def _check_agreement(
        self, first: npt.NDArray[np.bool_], logps: npt.NDArray[np.float64], num_tokens: npt.NDArray[np.int32]
    ) -> None:
        kept = np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))
        allowed = TOLERANCE_PER_TOKEN[self.identity.dtype] * num_tokens
        wrong = (np.abs(logps - logps[kept]) > allowed) | (num_tokens != num_tokens[kept])
        if wrong.any():
            row = int(np.argmax(wrong))
            raise UserError(
                f"{self.path}: {int(wrong.sum())} rows stand in two shards with different values, as "
                f"{logps[kept[row]]:.6f} and {logps[row]:.6f} nats; delete the folder and recompute it"
            )


def _sortable(keys: Keys) -> npt.NDArray[np.bytes_]:
    """V16 -> S16, which numpy can sort; numpy pads with zero bytes, so equal width keeps keys distinct."""
    return np.ascontiguousarray(keys).view(f"S{KEY_BYTES}")


def _keys_of(table: pa.Table) -> Keys:
    """(N,) V16, without a Python object a row."""
    column = table["key"].combine_chunks()
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [
        np.frombuffer(c.buffers()[1], dtype=f"V{KEY_BYTES}")[c.offset : c.offset + len(c)]
        for c in chunks
        if len(c)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=f"V{KEY_BYTES}")


def _read_shard(path: Path) -> pa.Table:
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        table, promised = file.read(), file.metadata.num_rows
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: names that are no text
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path}: damaged shard ({reason}); delete it and run precompute-ref again"
        ) from error
    if table.num_rows != promised:
        raise UserError(
            f"{path}: damaged shard (it has {table.num_rows} of {promised} rows); delete it and run "
            "precompute-ref again"
        )
    if [*table.schema][: len(SCHEMA)] != [*SCHEMA]:
        columns = ", ".join(f"{field.name} ({field.type})" for field in SCHEMA)
        raise UserError(f"{path}: not a shard of a reference cache; expected the columns {columns}")
    return table.select(SCHEMA.names)


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
