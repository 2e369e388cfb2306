"""A data set that is built in parts is the same for any number of processes and nodes, killed or not."""

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dpo.config import DataConfig, DataSource
from dpo.data import blocks as blocks_module
from dpo.data import parts as parts_module
from dpo.data.build import open_datasets
from dpo.data.dataset import ARRAYS, TokenizedDataset, map_dataset
from dpo.data.parts import Recipe, build_dataset
from dpo.data.sources import open_source
from dpo.errors import UserError

NUM_ROWS = 60


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks_module, "ROWS_PER_BLOCK", 7)


def row(number: int) -> dict[str, Any]:
    """Some rows are faulty, some columns unused, some groups have scores."""
    if number % 13 == 5:
        return {"prompt": f"the {number}", "chosen": " cat"}
    scored = {"prompt": f"the {number}", "completions": [" cat", " mat", " sat"], "scores": [2, number, 1]}
    return scored if number % 2 else {"prompt": f"a {number}", "chosen": " day", "rejected": " sat", "x": 1}


@pytest.fixture
def files(write_jsonl: Callable[..., str]) -> list[DataSource]:
    rows = [row(number) for number in range(NUM_ROWS)]
    return [
        DataSource(path=write_jsonl(rows, "a.jsonl"), weight=1.5),
        DataSource(path=write_jsonl(rows[:20], "b.jsonl")),
    ]


def built(
    files: list[DataSource], tokenizer: PreTrainedTokenizerFast, folder: Path, **options: Any
) -> TokenizedDataset:
    data = DataConfig(train=list(files), cache_dir=str(folder), max_length=64, **options)
    return open_datasets(data, tokenizer, 64)[0]


def content(data: TokenizedDataset) -> tuple[Any, ...]:
    arrays = [np.asarray(getattr(data, name)).tobytes() for name in (*ARRAYS, "tokens")]
    return (*arrays, data.counts, data.sources, data.largest_id, (data.path / "counts.json").read_text())


def test_the_result_does_not_depend_on_the_number_of_processes_or_blocks(
    files: list[DataSource],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = built(files, tokenizer, tmp_path / "one", num_workers=1)
    assert content(built(files, tokenizer, tmp_path / "two", num_workers=2)) == content(alone)
    assert len(alone) > NUM_ROWS
    unweighted = [DataSource(path=file.path) for file in files]
    in_blocks = built(unweighted, tokenizer, tmp_path / "blocks")
    monkeypatch.setattr(blocks_module, "ROWS_PER_BLOCK", 4096)
    assert content(built(unweighted, tokenizer, tmp_path / "whole")) == content(in_blocks)
    assert not [*tmp_path.rglob("*.parts")]


def test_what_was_dropped_and_not_used_is_counted_over_all_parts(
    files: list[DataSource], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    data = built(files[1:], tokenizer, tmp_path)
    (source,) = data.sources
    assert data.counts["dropped/missing_field"] == 2  # 5, 18
    assert source.notes.first_fault.startswith(f"{files[1].path}:6: ")
    assert f"{files[1].path}: columns that are not used: x (9 rows)" in source.notes.lines(source.name)
    assert source.groups == len(data) == 18


def test_a_killed_build_goes_on_from_the_parts_that_it_finished(
    files: list[DataSource],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undisturbed = content(built(files, tokenizer, tmp_path / "undisturbed"))
    write, written = parts_module._write_part, []

    def killed(recipe: Recipe, part: parts_module.Part) -> int:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(part.number)
        return write(recipe, part)

    monkeypatch.setattr(parts_module, "_write_part", killed)
    with pytest.raises(KeyboardInterrupt):
        built(files, tokenizer, tmp_path / "killed", num_workers=1)
    (left,) = (tmp_path / "killed").glob("*.parts")
    shutil.copytree(
        next(left.glob("000003-*")), left / ".000007-0.abc.writing"
    )  # as a killed process leaves it
    written.clear()
    monkeypatch.setattr(
        parts_module, "_write_part", lambda recipe, part: written.append(part.number) or write(recipe, part)
    )
    assert content(built(files, tokenizer, tmp_path / "killed", num_workers=1)) == undisturbed
    assert written == [*range(5, 12)]
    assert not left.exists()


def test_nodes_share_the_parts(
    files: list[DataSource],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = built(files, tokenizer, tmp_path / "alone")
    sources = [open_source(file, "train", key="data.train") for file in files]
    data = DataConfig(train=list(files), max_length=64, num_workers=1)
    recipe = Recipe(
        sources=sources, data=data, max_length=64, tokenizer=tokenizer, folder=tmp_path / "shared" / "data"
    )
    found = [parts_module._write_parts(recipe, "train", node, 3) for node in range(3)]
    assert found == [12, 12, 12]
    assert len([*recipe.parts.glob("[0-9]*")]) == 12
    parts_module._join(recipe, 12)
    assert content(map_dataset(recipe.folder, "")) == content(alone)


def test_a_part_that_is_missing_is_never_left_out(
    files: list[DataSource], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    sources = [open_source(file, "train", key="data.train") for file in files]
    data = DataConfig(train=list(files), max_length=64, num_workers=1)
    recipe = Recipe(sources=sources, data=data, max_length=64, tokenizer=tokenizer, folder=tmp_path / "data")
    parts_module._write_parts(recipe, "train", 0, 1)
    shutil.rmtree(next(recipe.parts.glob("000004-*")))
    with pytest.raises(UserError, match=r"data\.cache_dir: .*11 of 12 parts .*The same command goes on"):
        parts_module._join(recipe, 12)
    assert not recipe.folder.exists()


@pytest.mark.parametrize("moment", ["before", "while", "joined"])
def test_of_two_jobs_that_tokenize_the_same_data_the_second_uses_what_the_first_made(
    files: list[DataSource],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """The other job finishes, and removes the parts, at any moment of this one."""
    sources = [open_source(file, "train", key="data.train") for file in files]
    data = DataConfig(train=list(files), max_length=64, num_workers=1)
    recipe = Recipe(sources=sources, data=data, max_length=64, tokenizer=tokenizer, folder=tmp_path / "data")
    other = lambda: build_dataset(recipe, "train")  # noqa: E731
    write, join, calls = parts_module._write_part, parts_module._join, [0]
    if moment == "while":

        def overtaken(recipe: Recipe, part: parts_module.Part) -> int:
            calls[0] += 1
            if calls[0] == 4:
                other()
            return write(recipe, part)

        monkeypatch.setattr(parts_module, "_write_part", overtaken)
    elif moment == "joined":

        def late(recipe: Recipe, num_parts: int) -> None:
            calls[0] += 1
            if calls[0] == 1:
                other()
            join(recipe, num_parts)

        monkeypatch.setattr(parts_module, "_join", late)
    else:
        other()
    build_dataset(recipe, "train")
    assert len(map_dataset(recipe.folder, "")) > NUM_ROWS
    assert [path.name for path in tmp_path.glob("*data*")] == ["data"]


def test_a_full_disk_is_an_error_that_says_how_to_go_on(
    files: list[DataSource],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for place in ("write_arrays", "_join_arrays"):
        with monkeypatch.context() as patch:
            patch.setattr(parts_module, place, full)
            with pytest.raises(UserError, match=r"data\.cache_dir: .*No space left on device.*goes on"):
                built(files, tokenizer, tmp_path, num_workers=1)
    assert len(built(files, tokenizer, tmp_path, num_workers=1)) > NUM_ROWS


def test_strict_stops_at_the_first_faulty_row_also_in_processes(
    files: list[DataSource], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    for workers in (1, 2):
        with pytest.raises(UserError, match=r"a\.jsonl:6: no field 'rejected'"):
            built(files, tokenizer, tmp_path / str(workers), num_workers=workers, strict=True)


def test_a_broken_line_is_an_error_also_in_processes(
    files: list[DataSource], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    with Path(files[0].path).open("a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match=r"a\.jsonl:61: not valid JSON"):
        built(files, tokenizer, tmp_path, num_workers=2)


def test_data_without_a_row_is_empty(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, write_jsonl: Callable[..., str]
) -> None:
    with pytest.raises(UserError, match="the source is empty"):
        built([DataSource(path=write_jsonl([], "none.jsonl"))], tokenizer, tmp_path)


def test_the_bar_counts_the_bytes_of_all_files(
    files: list[DataSource],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, float]] = []

    class Bar:
        def __init__(self, total: int, **_: Any) -> None:
            self.total, self.n = total, 0

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None:
            seen.append((self.total, self.n))

        def update(self, number: int) -> None:
            self.n += number

    monkeypatch.setattr(parts_module.terminal, "bar", Bar)
    built(files, tokenizer, tmp_path)
    size = sum(Path(file.path).stat().st_size for file in files)
    assert seen == [(size, size)]
