"""Every format gives the same rows, whole or in blocks, and a damaged file is one error with its place."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo.data import blocks as blocks_module
from dpo.data.blocks import Lines, Table, Values, blocks_of
from dpo.errors import UserError

ROWS = [{"prompt": f"p{number} é", "chosen": ' yes,\n"so"', "rejected": " no"} for number in range(10)]


def json_lines(rows: list[Any]) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def json_array(rows: list[Any]) -> bytes:
    return json.dumps(rows, indent=1, ensure_ascii=False).encode()


def table_of_text(rows: list[Any]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode("utf-8-sig")


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def parquet(rows: list[Any]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=4)
    return sink.getvalue()


def arrow_stream(rows: list[Any]) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return sink.getvalue()


FORMATS: dict[str, Callable[[list[Any]], bytes]] = {
    "data.jsonl": json_lines,
    "data.jsonl.gz": lambda rows: gzip.compress(json_lines(rows)),
    "data.jsonl.zst": lambda rows: zstd(json_lines(rows)),
    "lines.json": json_lines,
    "data.json": json_array,
    "data.json.gz": lambda rows: gzip.compress(json_array(rows)),
    "data.csv": table_of_text,
    "data.csv.zst": lambda rows: zstd(table_of_text(rows)),
    "data.parquet": parquet,
    "data.arrow": arrow_stream,
}


@pytest.fixture(params=FORMATS)
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    path.write_bytes(FORMATS[request.param](ROWS))
    return path


@pytest.mark.parametrize("per_block", [3, 4096])
def test_every_format_gives_the_rows_in_order(
    file: Path, per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks_module, "ROWS_PER_BLOCK", per_block)
    monkeypatch.setattr(blocks_module, "_CHARACTERS_PER_READ", 50)  # an item of an array is longer
    blocks = list(blocks_of(file))
    assert [row for block in blocks for _, row in block.rows()] == ROWS
    assert [block.num_rows for block in blocks] == ([3, 3, 3, 1] if per_block == 3 else [10])
    assert [block.first for block in blocks] == ([1, 4, 7, 10] if per_block == 3 else [1])


def test_a_place_names_file_and_row(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "ROWS_PER_BLOCK", 4)
    places = [place for block in blocks_of(file) for place, _ in block.rows()]
    form = ":{}" if "jsonl" in file.name or "lines" in file.name else ": row {}"
    assert places == [f"{file}{form.format(number)}" for number in range(1, 11)]


@pytest.mark.parametrize(("start", "count"), [(0, 0), (0, 5), (0, 12), (3, 4), (9, 5), (10, 1), (12, 3)])
def test_a_part_of_a_block_is_some_of_its_rows_with_their_places(file: Path, start: int, count: int) -> None:
    (block,) = blocks_of(file)
    part = block.part(start, count)
    assert [*part.rows()] == [*block.rows()][start : start + count]
    assert part.num_rows == len(ROWS[start : start + count])


def test_the_blocks_cover_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "ROWS_PER_BLOCK", 4)
    covered = sum(block.num_bytes for block in blocks_of(file))
    assert 0.6 * file.stat().st_size < covered <= file.stat().st_size


def test_empty_lines_are_no_rows_and_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"a": 1}\n  \n{"a": 2}')
    (block,) = blocks_of(path)
    assert isinstance(block, Lines)
    assert list(block.rows()) == [(f"{path}:2", {"a": 1}), (f"{path}:4", {"a": 2})]
    assert block.num_rows == 2
    assert [*block.part(0, 1).rows()] == [*block.rows()][:1]
    assert [*block.part(1, 5).rows()] == [*block.rows()][1:]


def test_long_rows_make_shorter_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "BYTES_PER_BLOCK", 3000)
    rows = [{"text": "x" * 1000} for _ in range(8)]
    for name, write in (("a.jsonl", json_lines), ("a.parquet", parquet), ("a.arrow", arrow_stream)):
        path = tmp_path / name
        path.write_bytes(write([{"text": f"{n}{row['text']}"} for n, row in enumerate(rows)]))
        assert max(block.num_rows for block in blocks_of(path)) <= 4
        assert sum(block.num_rows for block in blocks_of(path)) == 8


def test_a_table_reads_the_row_groups_that_it_needs(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(parquet(ROWS))  # row groups of 4
    for first in range(10):
        for count in range(1, 11 - first):
            block = Table(name="t", first=first + 1, num_bytes=0, file=path, count=count)
            assert [row for _, row in block.rows()] == ROWS[first : first + count]


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    for name, content in (("a.jsonl", b""), ("a.json", b"[]"), ("a.json", b""), ("a.csv", b"a,b\n")):
        (tmp_path / name).write_bytes(content)
        assert [row for block in blocks_of(tmp_path / name) for row in block.rows()] == []


def test_an_empty_cell_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,system\nhi,\n")
    (block,) = blocks_of(tmp_path / "a.csv")
    assert isinstance(block, Values)
    assert block.values == [{"prompt": "hi", "system": None}]


def test_the_names_of_a_spreadsheet_may_be_quoted_and_its_cells_may_be_long(tmp_path: Path) -> None:
    long = "x" * 200_000  # beyond the csv module's default limit
    (tmp_path / "a.csv").write_text(f'"prompt","chosen"\n"a","{long}"\n')
    (block,) = blocks_of(tmp_path / "a.csv")
    assert [row for _, row in block.rows()] == [{"prompt": "a", "chosen": long}]


@pytest.mark.parametrize(
    "name", [name for name in FORMATS if name not in ("data.jsonl", "lines.json", "data.csv")]
)
def test_a_file_that_was_cut_off_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    content = FORMATS[name](ROWS * 50)
    (tmp_path / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=f"{name}: "):
        [list(block.rows()) for block in blocks_of(tmp_path / name)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"a": 1}\n{broken\n', "a.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{\n "a": 1\n}\n', "a.jsonl:1: not valid JSON"),
        ("a.json", b'[{"a": 1}, {broken}]', "a.json: row 2: not valid JSON"),
        ("a.jsonl", b"\xff\xfe{}", "a.jsonl"),
        ("a.csv", b'a\n"x" y\n', "a.csv: cannot be read"),
        ("a.csv", b"a\n\xff\n", "a.csv: cannot be read"),
        ("a.parquet", b"PAR1", "a.parquet: cannot be read"),
    ],
)
def test_broken_content_is_an_error_with_its_place(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        [list(block.rows()) for block in blocks_of(tmp_path / name)]
    assert said in str(error.value)
