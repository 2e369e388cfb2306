"""Sources on disk: files, folders in every layout, patterns, and the options of a source."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo.config import DataSource
from dpo.data.notes import RowNotes
from dpo.data.rows import read_groups
from dpo.data.sources import PreferenceSource, counterpart, read_rows
from dpo.data.sources import has_split as source_has_split
from dpo.data.sources import open_source as open_data_source
from dpo.errors import UserError

ROWS = [{"prompt": f"p{number}", "chosen": " yes", "rejected": " no"} for number in range(3)]
HH = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "hh-harmless" / "test.jsonl.gz"


def open_source(path: str, default: str, *, key: str, **options: Any) -> PreferenceSource:
    return open_data_source(DataSource(path=path, **options), default, key=key)


def has_split(path: str, split: str) -> bool:
    return source_has_split(DataSource(path=path), split)


def prompts(source: PreferenceSource) -> list[Any]:
    groups = read_groups(
        read_rows(source), pairing="best-vs-rest", min_margin=0.0, strict=True, notes=RowNotes()
    )
    return [group.prompt for group in groups]


def write_lines(path: Path, rows: list[Any]) -> Path:
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def _write_folder(folder: Path, complete: object = True) -> Path:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "train.parquet")
    (folder / "manifest.json").write_text(json.dumps({"completions_are_complete": complete}))
    return folder


@pytest.mark.parametrize("name", ["data.jsonl", "data.jsonl.gz"])
def test_json_lines_are_read_plain_and_compressed(tmp_path: Path, name: str) -> None:
    source = open_source(str(write_lines(tmp_path / name, ROWS)), "test", key="data.test")
    assert prompts(source) == ["p0", "p1", "p2"]
    assert source.completions_are_complete is None


def test_a_parquet_file_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data.parquet")
    assert prompts(open_source(str(tmp_path / "data.parquet"), "train", key="k")) == ["p0", "p1", "p2"]


def test_a_folder_has_the_splits_of_its_files_and_its_manifest_is_read(tmp_path: Path) -> None:
    folder = str(_write_folder(tmp_path / "prepared", complete=False))
    source = open_source(folder, "train", key="data.train")
    assert prompts(source) == ["p0", "p1", "p2"]
    assert source.completions_are_complete is False
    assert (has_split(folder, "train"), has_split(folder, "test")) == (True, False)
    with pytest.raises(UserError, match=r"data\.train: .*no files of the split test, but of train"):
        open_source(folder, "test", key="data.train")


def test_the_fingerprint_depends_on_the_content_and_not_on_the_name(tmp_path: Path) -> None:
    def fingerprint(name: str, rows: list[Any]) -> str:
        return open_source(str(write_lines(tmp_path / name, rows)), "train", key="k").fingerprint

    assert fingerprint("a.jsonl", ROWS) == fingerprint("b.jsonl", ROWS)
    assert fingerprint("a.jsonl", ROWS) != fingerprint("b.jsonl", ROWS[:2])


def test_the_fingerprint_depends_on_completions_are_complete(tmp_path: Path) -> None:
    complete = open_source(str(_write_folder(tmp_path / "a", complete=True)), "train", key="k")
    fragments = open_source(str(_write_folder(tmp_path / "b", complete=False)), "train", key="k")
    assert complete.fingerprint != fragments.fingerprint


def test_a_broken_json_line_is_an_error_with_file_and_line_even_when_not_strict(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", ROWS)
    path.write_text(path.read_text() + "\n{broken\n")  # line 4 is empty, line 5 is broken
    source = open_source(str(path), "train", key="k")
    groups = read_groups(read_rows(source), pairing="all", min_margin=0.0, strict=False, notes=RowNotes())
    with pytest.raises(UserError, match=r"data\.jsonl:5: "):
        list(groups)


def test_rows_before_a_broken_line_have_already_been_read(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", ROWS[:1])
    path.write_text(path.read_text() + "{broken\n")
    source = open_source(str(path), "train", key="k")
    groups = read_groups(read_rows(source), pairing="all", min_margin=0.0, strict=False, notes=RowNotes())
    assert next(groups).prompt == "p0"


def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"data\.jsonl\.gz: "):
        prompts(open_source(str(path), "train", key="k"))


def test_a_damaged_parquet_page_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, write_page_checksum=True, compression="none")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"p1", b"q1", 1))
    with pytest.raises(UserError, match=r"data\.parquet: "):
        prompts(open_source(str(path), "train", key="k"))


@pytest.mark.parametrize("path", ["./nothing", "/nothing/there", "~/nothing", "a/b/c", "data.jsonl", ""])
def test_a_missing_local_path_is_an_error_without_asking_the_hub(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo.data.hub._reach_hub", lambda path: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"data\.train: "):
        open_source(path, "train", key="data.train")
    assert not has_split(path, "test")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.tsv").write_text("a\tb\n")
    with pytest.raises(UserError, match=r"k: .*data\.tsv is a file with \.tsv; expected one of \.parquet"):
        open_source(str(tmp_path / "data.tsv"), "train", key="k")


@pytest.mark.parametrize("manifest", ["{", "[]", "{}", '{"completions_are_complete": "yes"}'])
def test_a_broken_manifest_is_an_error(tmp_path: Path, manifest: str) -> None:
    folder = _write_folder(tmp_path / "prepared")
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_source(str(folder), "train", key="k")


@pytest.mark.parametrize(
    "layout", ["shards", "data folder", "split folders", "saved", "saved splits", "pattern"]
)
def test_a_data_set_in_many_files_is_read_in_order(tmp_path: Path, layout: str) -> None:
    halves = [datasets.Dataset.from_list(ROWS[:2]), datasets.Dataset.from_list(ROWS[2:])]
    folder, path = tmp_path / "set", str(tmp_path / "set")
    (folder / "data").mkdir(parents=True)
    (folder / "train").mkdir()
    names = {
        "shards": "train-{:05}-of-00002.parquet",
        "data folder": "data/train-{:05}-of-00002.parquet",
        "split folders": "train/{}.parquet",
        "pattern": "part {}.parquet",
    }
    if layout in names:
        for number, half in enumerate(halves):
            half.to_parquet(folder / names[layout].format(number))
        path = f"{folder}/part*.parquet" if layout == "pattern" else path
    elif layout == "saved":
        datasets.Dataset.from_list(ROWS).save_to_disk(folder, num_shards=2)
    else:
        datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(folder)
        with pytest.raises(UserError, match="no files of the split test"):
            open_source(path, "test", key="k")
    assert prompts(open_source(path, "train", key="k")) == ["p0", "p1", "p2"]
    assert not has_split(path, "test")


def test_any_split_and_its_counterpart(tmp_path: Path) -> None:
    for split, rows in (("train_prefs", ROWS), ("test_prefs", ROWS[:1]), ("train", ROWS[1:])):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}-00000-of-00001.parquet")
    path = str(tmp_path)
    assert prompts(open_source(path, "train", key="k", split="train_prefs")) == ["p0", "p1", "p2"]
    assert counterpart(DataSource(path=path, split="train_prefs", weight=2.0, rows=1)) == DataSource(
        path=path, split="test_prefs"
    )
    assert counterpart(DataSource(path=path)) is None  # there is no test
    assert counterpart(DataSource(path=path, split="test_prefs")) is None
    with pytest.raises(UserError, match="no files of the split dev, but of test_prefs, train, train_prefs"):
        open_source(path, "train", key="k", split="dev")


def test_the_names_of_columns_and_the_number_of_rows_are_options(tmp_path: Path) -> None:
    path = str(write_lines(tmp_path / "data.jsonl", ROWS))
    whole, first = open_source(path, "train", key="k"), open_source(path, "train", key="k", rows=2)
    assert prompts(first) == ["p0", "p1"]
    mapped = open_source(path, "train", key="k", columns={"prompt": "chosen"})
    assert len({source.fingerprint for source in (whole, first, mapped)}) == 3
    assert open_source(path, "train", key="k", weight=2.0).fingerprint == whole.fingerprint


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"split": "test"}, "split: test"),
        ({"name": "x"}, "name: x"),
        ({"revision": "main"}, "revision: main"),
    ],
)
def test_an_option_that_a_file_does_not_have_is_refused(
    tmp_path: Path, options: dict[str, str], said: str
) -> None:
    path = str(write_lines(tmp_path / "data.jsonl", ROWS))
    with pytest.raises(UserError, match=f"k: {said}; .*leave it out"):
        open_source(path, "train", key="k", **options)


def test_the_name_of_a_source_says_its_part() -> None:
    source = PreferenceSource(
        options=DataSource(path="a/b", name="c", split="d"),
        split="d",
        files=(),
        completions_are_complete=None,
        fingerprint="",
        key="",
    )
    assert source.path == "a/b [c] [d]"


def test_a_pattern_without_files_and_one_of_several_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"k: no file matches"):
        open_source(f"{tmp_path}/*.jsonl", "train", key="k")
    write_lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.txt").touch()
    with pytest.raises(UserError, match=r"files with \.jsonl, \.txt"):
        open_source(f"{tmp_path}/*", "train", key="k")


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(UserError, match=r"no files of the split train, nor any that ends with \.parquet"):
        open_source(str(tmp_path), "train", key="k")


@pytest.mark.skipif(not HH.is_file(), reason="the shared HH-RLHF file is not beside the repository")
def test_the_real_hh_file_loses_only_its_four_empty_completions() -> None:
    notes = RowNotes()
    source = open_source(str(HH), "train", key="k")
    groups = list(
        read_groups(read_rows(source), pairing="best-vs-rest", min_margin=0.0, strict=False, notes=notes)
    )
    assert (len(groups), notes.drops) == (2312 - 4, {"empty_completion": 4})
    assert all(str(group.prompt).endswith("\n\nAssistant:") for group in groups)
