"""Raw rows of files in blocks: a few thousand rows that are read, decoded and tokenized as one piece.

Where the blocks of a file end depends on its content alone, so whoever reads them, and in whatever order,
gets the same rows. Lines are split off here and decoded by whoever works on the block; tables are read by it.
"""

import csv
import gzip
import io
import json
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo.data.locate import suffix_of
from dpo.errors import UserError

ROWS_PER_BLOCK = 4096
BYTES_PER_BLOCK = 8 << 20
"""Of lines, or of a table's columns in memory: rows may be long conversations."""
_CHARACTERS_PER_READ = 1 << 20
_BETWEEN_ITEMS = re.compile(r"[\s,]*")

Row = tuple[str, Any]
"""A place for messages, and a raw row: `file:line` for lines, else the file and the row's number from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block(ABC):
    """Consecutive rows of one file."""

    name: str
    """Of the file, for messages."""
    first: int
    """Number of the first row, or line, from 1."""
    num_bytes: int
    """Of the file that it covers."""

    @abstractmethod
    def rows(self) -> Iterator[Row]:
        """The rows, decoded. Raises UserError where they cannot be."""

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Number of rows."""

    @abstractmethod
    def part(self, start: int, count: int) -> "Block":
        """Some of its rows, from the row `start` of the block on, which counts from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines(Block):
    """Lines of JSON; empty ones are no rows."""

    lines: list[bytes]

    def rows(self) -> Iterator[Row]:
        """As in `Block`."""
        for number, line in enumerate(self.lines, start=self.first):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise UserError(
                        f"{self.name}:{number}: not valid JSON ({error}); expected one JSON object per line"
                    ) from error
                yield f"{self.name}:{number}", row

    @property
    def num_rows(self) -> int:
        """As in `Block`."""
        return sum(bool(line.strip()) for line in self.lines)

    def part(self, start: int, count: int) -> "Lines":
        """As in `Block`."""
        full = [index for index, line in enumerate(self.lines) if line.strip()]
        full.append(len(self.lines))
        first, end = (full[min(place, len(full) - 1)] for place in (start, start + count))
        return replace(self, first=self.first + first, lines=self.lines[first:end])


@dataclass(frozen=True, slots=True, kw_only=True)
class Values(Block):
    """Rows that had to be decoded to find where they end."""

    values: list[Any]

    def rows(self) -> Iterator[Row]:
        """As in `Block`."""
        for number, value in enumerate(self.values, start=self.first):
            yield f"{self.name}: row {number}", value

    @property
    def num_rows(self) -> int:
        """As in `Block`."""
        return len(self.values)

    def part(self, start: int, count: int) -> "Values":
        """As in `Block`."""
        return replace(self, first=self.first + start, values=self.values[start : start + count])


@dataclass(frozen=True, slots=True, kw_only=True)
class Table(Block):
    """Rows of a Parquet or Arrow file."""

    file: Path
    count: int

    def rows(self) -> Iterator[Row]:
        """As in `Block`."""
        batches = _parquet_batches if suffix_of(self.file.name) == ".parquet" else _arrow_batches
        number = self.first
        with _readable(self.name, lambda: f"after row {number}"):
            for batch in batches(self.file, self.first - 1, self.count):
                for row in batch.to_pylist():
                    yield f"{self.name}: row {number}", row
                    number += 1

    @property
    def num_rows(self) -> int:
        """As in `Block`."""
        return self.count

    def part(self, start: int, count: int) -> "Table":
        """As in `Block`."""
        count = max(min(self.count - start, count), 0)
        return replace(self, first=self.first + start, count=count)


def blocks_of(file: Path) -> Iterator[Block]:
    """The blocks of a file, in order. Raises UserError where it is damaged."""
    suffix = suffix_of(file.name) or ".jsonl"
    if suffix in (".parquet", ".arrow"):
        return tables_of(file)
    if suffix.startswith(".csv"):
        return _csv_blocks(file)
    return _array_blocks(file) if suffix.startswith(".json") and _holds_array(file) else _line_blocks(file)


def row_blocks(rows: Iterable[Any], name: str) -> Iterator[Block]:
    """The blocks of a stream of rows that are decoded already; `name` is for messages."""
    stream, first = iter(rows), 1
    while values := list(islice(stream, ROWS_PER_BLOCK)):
        yield Values(name=name, first=first, num_bytes=0, values=values)
        first += len(values)


def tables_of(file: Path) -> Iterator[Table]:
    """The blocks of a Parquet or Arrow file."""
    name = str(file)
    with _readable(name, lambda: "to its end"):
        if suffix_of(file.name) == ".parquet":
            with pq.ParquetFile(file) as parquet:
                metadata = parquet.metadata
                in_memory = sum(metadata.row_group(n).total_byte_size for n in range(metadata.num_row_groups))
                num_rows = metadata.num_rows
        else:
            batches = list(_arrow_stream(file))
            num_rows, in_memory = sum(b.num_rows for b in batches), sum(b.nbytes for b in batches)
        size = file.stat().st_size
    per_block = max(1, min(ROWS_PER_BLOCK, BYTES_PER_BLOCK * num_rows // max(in_memory, 1)))
    for first in range(0, num_rows, per_block):
        count = min(per_block, num_rows - first)
        yield Table(name=name, first=first + 1, num_bytes=size * count // num_rows, file=file, count=count)


def _parquet_batches(file: Path, first: int, count: int) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        groups: list[int] = []
        start = begin = 0
        for index in range(parquet.metadata.num_row_groups):
            end = start + parquet.metadata.row_group(index).num_rows
            if start < first + count and end > first:
                begin = begin if groups else start
                groups.append(index)
            start = end
        batches = parquet.iter_batches(batch_size=1024, row_groups=groups)
        yield from _cut(batches, first - begin, count)


def _arrow_batches(file: Path, first: int, count: int) -> Iterator[pa.RecordBatch]:
    yield from _cut(_arrow_stream(file), first, count)


def _arrow_stream(file: Path) -> Iterator[pa.RecordBatch]:
    """The batches of a file that `datasets` wrote: a stream, mapped into memory."""
    yield from pa.ipc.open_stream(pa.memory_map(str(file)))


def _cut(batches: Iterable[pa.RecordBatch], first: int, count: int) -> Iterator[pa.RecordBatch]:
    """The rows first to first + count of a stream of batches."""
    start = 0
    for batch in batches:
        low, high = max(first - start, 0), min(first + count - start, batch.num_rows)
        if low < high:
            yield batch.slice(low, high - low)
        start += batch.num_rows
        if start >= first + count:
            return


def _line_blocks(file: Path) -> Iterator[Lines]:
    number, done = 1, 0
    with _readable(str(file), lambda: f"after line {number}"), file.open("rb") as raw:
        content = _unpacked(raw, file)  # which closes the file when it is gone
        lines: list[bytes] = []
        size = 0
        for line in content:
            lines.append(line)
            size += len(line)
            if len(lines) >= ROWS_PER_BLOCK or size >= BYTES_PER_BLOCK:
                yield Lines(name=str(file), first=number, num_bytes=raw.tell() - done, lines=lines)
                number, done, lines, size = number + len(lines), raw.tell(), [], 0
        if lines:
            yield Lines(name=str(file), first=number, num_bytes=raw.tell() - done, lines=lines)


def _csv_blocks(file: Path) -> Iterator[Values]:
    """A line of names, then rows of text; an empty cell holds nothing."""
    csv.field_size_limit(2**31 - 1)
    with _readable(str(file), lambda: "to its end"), file.open("rb") as raw:
        text = io.TextIOWrapper(_unpacked(raw, file), encoding="utf-8-sig", newline="")
        rows = csv.DictReader(text, strict=True)
        yield from _value_blocks(str(file), raw, ({k: v or None for k, v in row.items()} for row in rows))


def _array_blocks(file: Path) -> Iterator[Values]:
    """The items of one JSON array, read as a stream."""
    with _readable(str(file), lambda: "to its end"), file.open("rb") as raw:
        text = io.TextIOWrapper(_unpacked(raw, file), encoding="utf-8-sig")
        yield from _value_blocks(str(file), raw, _array_items(text, str(file)))


def _value_blocks(name: str, raw: IO[bytes], rows: Iterator[Any]) -> Iterator[Values]:
    number, done = 1, 0
    values: list[Any] = []
    for row in rows:
        values.append(row)
        if len(values) == ROWS_PER_BLOCK:
            yield Values(name=name, first=number, num_bytes=raw.tell() - done, values=values)
            number, done, values = number + len(values), raw.tell(), []
    if values:
        yield Values(name=name, first=number, num_bytes=raw.tell() - done, values=values)


def _array_items(text: IO[str], name: str) -> Iterator[Any]:
    decoder = json.JSONDecoder()
    waiting = text.read(_CHARACTERS_PER_READ)
    place, number = waiting.index("[") + 1, 1
    while True:
        place = _BETWEEN_ITEMS.match(waiting, place).end()  # type: ignore[union-attr]
        if waiting.startswith("]", place):
            return
        try:
            value, place = decoder.raw_decode(waiting, place)
        except ValueError as error:
            waiting = waiting[place:]
            more = text.read(max(_CHARACTERS_PER_READ, len(waiting)))  # twice as much, so that long items end
            if not more:
                raise UserError(
                    f"{name}: row {number}: not valid JSON ({error}); expected an array of objects"
                ) from error
            waiting, place = waiting + more, 0
            continue
        yield value
        number += 1


def _holds_array(file: Path) -> bool:
    with _readable(str(file), lambda: "from its start"), file.open("rb") as raw:
        start = _unpacked(raw, file).read(1024)
    return start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _unpacked(raw: IO[bytes], file: Path) -> IO[bytes]:
    """The content of a file that may be packed."""
    if file.name.lower().endswith(".gz"):
        return gzip.open(raw)  # type: ignore[return-value]
    if file.name.lower().endswith(".zst"):
        return io.BufferedReader(pa.CompressedInputStream(raw, "zstd"))
    return raw


@contextmanager
def _readable(name: str, where: Callable[[], str]) -> Iterator[None]:
    """Raises UserError for everything that a damaged file makes its readers raise."""
    try:
        yield
    except (pa.ArrowException, OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name}: cannot be read {where()} ({reason}); fetch or write it again") from error
