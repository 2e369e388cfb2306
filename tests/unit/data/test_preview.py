"""What `dpo check` reads: rows at the start, between and at the end of each source, through the tokenizer."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from dpo.config import DataConfig, DataSource
from dpo.data import blocks as blocks_module
from dpo.data import build
from dpo.data.build import train_sources_of
from dpo.data.preview import ROWS_PER_PLACE, preview_data, some_blocks
from dpo.data.sources import open_source
from dpo.errors import UserError

ROWS = [{"prompt": f"the {number}", "chosen": " cat", "rejected": " mat"} for number in range(2000)]


def preview(data: DataConfig, *arguments: Any) -> Any:
    return preview_data(train_sources_of(data), build.test_sources_of(data), data, *arguments)


def rows_at(path: str, **options: Any) -> list[tuple[str, Any]]:
    source = open_source(DataSource(path=path, **options), "train", key="data.train")
    return [row for block in some_blocks(source) for row in block.rows()]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "ROWS_PER_BLOCK", 100)


def numbers(found: list[tuple[str, Any]]) -> list[int]:
    return [int(row["prompt"].removeprefix("the ")) for _, row in found]


def test_lines_at_the_start_the_middle_and_the_end_have_their_numbers(
    write_jsonl: Callable[..., str],
) -> None:
    path = write_jsonl(ROWS)
    found = rows_at(path)
    looked_at = numbers(found)
    assert [place for place, _ in found] == [f"{path}:{number + 1}" for number in looked_at]
    assert looked_at[:ROWS_PER_PLACE] == [*range(ROWS_PER_PLACE)]
    assert 950 < looked_at[ROWS_PER_PLACE] < 1050
    assert looked_at[-ROWS_PER_PLACE:] == [*range(2000 - ROWS_PER_PLACE, 2000)]
    assert len(found) == 3 * ROWS_PER_PLACE


def test_a_table_is_looked_at_in_three_places(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    places = [0, 1000, 2000 - ROWS_PER_PLACE]
    assert numbers(rows_at(str(tmp_path / "a.parquet"))) == [
        start + offset for start in places for offset in range(ROWS_PER_PLACE)
    ]


def test_of_a_packed_file_the_start_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(f"{json.dumps(row)}\n" for row in ROWS).encode()))
    assert numbers(rows_at(str(path))) == [*range(ROWS_PER_PLACE), *range(100 - ROWS_PER_PLACE, 100)]


def test_of_many_files_the_first_the_last_and_some_between_are_looked_at(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"part-{number}.jsonl").write_text(json.dumps(ROWS[number]))
    assert numbers(rows_at(str(tmp_path))) == [0, 3, 6, 9]
    assert numbers(rows_at(str(tmp_path), rows=1)) == [0]


def test_a_short_file_is_read_once(write_jsonl: Callable[..., str]) -> None:
    assert numbers(rows_at(write_jsonl(ROWS[:5]))) == [0, 1, 2, 3, 4]


def test_a_faulty_row_at_the_end_is_found(
    write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    for number in (33, 70, 150, 2000):
        path = write_jsonl([*ROWS[:number], {"prompt": "the", "chosen": " x"}])
        found, _, _, _ = preview(DataConfig(train=path), tokenizer, 64)
        assert found[0].startswith(f"data.train: {path}: looked at ")
        assert f"{path}:{number + 1}: no field 'rejected'" in found[1]


def test_what_the_tokenizer_refuses_is_found(
    write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    chat = {**ROWS[0], "prompt": [{"role": "user", "content": "hi"}]}
    with pytest.raises(UserError, match="no chat template"):
        preview(DataConfig(train=write_jsonl([chat])), tokenizer, 64)
    long = {**ROWS[0], "prompt": "the cat " * 60}
    with pytest.raises(UserError, match=r"nothing left after filtering: 1 too_long"):
        preview(DataConfig(train=write_jsonl([long]), too_long="drop"), tokenizer, 64)


def test_lengths_that_no_row_could_have_are_refused(
    write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_jsonl(ROWS[:3])
    with pytest.raises(UserError, match=r"data\.max_length: 65"):
        preview(DataConfig(train=path, max_length=65), tokenizer, 64)
    with pytest.raises(UserError, match=r"data\.max_prompt_length: 64"):
        preview(DataConfig(train=path, max_prompt_length=64), tokenizer, 64)


def test_warnings_and_the_largest_id_are_returned(
    write_jsonl: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    path = write_jsonl(ROWS[:3])
    _, warnings, largest, _ = preview(DataConfig(train=path, test=path), tokenizer, 64)
    assert warnings == [f"data.test: {path} has the content of data.train; held-out metrics say nothing then"]
    assert largest == tokenizer.eos_token_id or 0 < largest < len(tokenizer)
