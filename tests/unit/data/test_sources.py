"""Sources on disk and, by the `datasets` library's own loader of a local folder, on the hub."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo.data.notes import RowNotes
from dpo.data.rows import read_groups
from dpo.data.sources import PreferenceSource, has_split, open_source
from dpo.errors import UserError

ROWS = [{"prompt": f"p{number}", "chosen": " yes", "rejected": " no"} for number in range(3)]
HH = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "hh-harmless" / "test.jsonl.gz"


def _prompts(source: PreferenceSource) -> list[Any]:
    groups = read_groups(source, pairing="best-vs-rest", min_margin=0.0, strict=True, notes=RowNotes())
    return [group.prompt for group in groups]


def _write_lines(path: Path, rows: list[Any]) -> Path:
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
    source = open_source(str(_write_lines(tmp_path / name, ROWS)), "test", key="data.test")
    assert _prompts(source) == ["p0", "p1", "p2"]
    assert source.completions_are_complete is None


def test_a_parquet_file_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "data.parquet")
    assert _prompts(open_source(str(tmp_path / "data.parquet"), "train", key="k")) == ["p0", "p1", "p2"]


def test_a_folder_has_the_splits_of_its_files_and_its_manifest_is_read(tmp_path: Path) -> None:
    folder = str(_write_folder(tmp_path / "prepared", complete=False))
    source = open_source(folder, "train", key="data.train")
    assert _prompts(source) == ["p0", "p1", "p2"]
    assert source.completions_are_complete is False
    assert (has_split(folder, "train"), has_split(folder, "test")) == (True, False)
    with pytest.raises(UserError, match=r"data\.train: .*has no test\.parquet"):
        open_source(folder, "test", key="data.train")


def test_the_fingerprint_depends_on_the_content_and_not_on_the_name(tmp_path: Path) -> None:
    def fingerprint(name: str, rows: list[Any]) -> str:
        return open_source(str(_write_lines(tmp_path / name, rows)), "train", key="k").fingerprint

    assert fingerprint("a.jsonl", ROWS) == fingerprint("b.jsonl", ROWS)
    assert fingerprint("a.jsonl", ROWS) != fingerprint("b.jsonl", ROWS[:2])


def test_the_fingerprint_depends_on_completions_are_complete(tmp_path: Path) -> None:
    complete = open_source(str(_write_folder(tmp_path / "a", complete=True)), "train", key="k")
    fragments = open_source(str(_write_folder(tmp_path / "b", complete=False)), "train", key="k")
    assert complete.fingerprint != fragments.fingerprint


def test_a_broken_json_line_is_an_error_with_file_and_line_even_when_not_strict(tmp_path: Path) -> None:
    path = _write_lines(tmp_path / "data.jsonl", ROWS)
    path.write_text(path.read_text() + "\n{broken\n")  # line 4 is empty, line 5 is broken
    source = open_source(str(path), "train", key="k")
    groups = read_groups(source, pairing="all", min_margin=0.0, strict=False, notes=RowNotes())
    with pytest.raises(UserError, match=r"data\.jsonl:5: "):
        list(groups)


def test_rows_before_a_broken_line_have_already_been_read(tmp_path: Path) -> None:
    path = _write_lines(tmp_path / "data.jsonl", ROWS[:1])
    path.write_text(path.read_text() + "{broken\n")
    source = open_source(str(path), "train", key="k")
    groups = read_groups(source, pairing="all", min_margin=0.0, strict=False, notes=RowNotes())
    assert next(groups).prompt == "p0"


def test_a_truncated_file_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = _write_lines(tmp_path / "data.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=r"data\.jsonl\.gz: "):
        _prompts(open_source(str(path), "train", key="k"))


def test_a_damaged_parquet_page_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, write_page_checksum=True, compression="none")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"p1", b"q1", 1))
    with pytest.raises(UserError, match=r"data\.parquet: "):
        _prompts(open_source(str(path), "train", key="k"))


@pytest.mark.parametrize("path", ["./nothing", "/nothing/there", "~/nothing", "a/b/c", "data.jsonl", ""])
def test_a_missing_local_path_is_an_error_without_asking_the_hub(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo.data.sources._reach_hub", lambda path: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match=r"data\.train: "):
        open_source(path, "train", key="data.train")
    assert not has_split(path, "test")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"data\.csv.*\.parquet"):
        open_source(str(tmp_path / "data.csv"), "train", key="k")


@pytest.mark.parametrize("manifest", ["{", "[]", "{}", '{"completions_are_complete": "yes"}'])
def test_a_broken_manifest_is_an_error(tmp_path: Path, manifest: str) -> None:
    folder = _write_folder(tmp_path / "prepared")
    (folder / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match=r"manifest\.json"):
        open_source(str(folder), "train", key="k")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder under the hub name some/thing; `datasets` streams it as if from the hub."""
    import datasets

    folder = tmp_path / "repository"
    folder.mkdir()
    builder = datasets.load_dataset_builder
    monkeypatch.setattr("dpo.data.sources._reach_hub", lambda path: None)
    monkeypatch.setattr(
        datasets,
        "load_dataset_builder",
        lambda path: builder({"some/thing": str(folder)}[path], cache_dir=str(tmp_path / "cache")),
    )
    monkeypatch.setattr(
        datasets, "get_dataset_split_names", lambda path: [file.stem for file in folder.iterdir()]
    )
    return folder


def test_a_hub_data_set_is_streamed_by_split(hub: Path) -> None:
    _write_lines(hub / "train.jsonl", ROWS)
    _write_lines(hub / "test.jsonl", ROWS[:1])
    source = open_source("some/thing", "test", key="data.test")
    assert (source.files, source.completions_are_complete) == ((), None)
    assert _prompts(source) == ["p0"]
    assert has_split("some/thing", "test")
    assert source.fingerprint != open_source("some/thing", "train", key="data.train").fingerprint


def test_a_hub_data_set_without_the_split_is_an_error(hub: Path) -> None:
    _write_lines(hub / "train.jsonl", ROWS)
    assert not has_split("some/thing", "test")
    with pytest.raises(UserError, match=r"data\.test: .*some/thing"):
        open_source("some/thing", "test", key="data.test")


def test_a_hub_that_cannot_be_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("dpo.data.sources._reach_hub", fail)
    with pytest.raises(UserError, match=r"data\.train: some/thing .*no route to host"):
        open_source("some/thing", "train", key="data.train")
    assert not has_split("some/thing", "test")


@pytest.mark.skipif(not HH.is_file(), reason="the shared HH-RLHF file is not beside the repository")
def test_the_real_hh_file_loses_only_its_four_empty_completions() -> None:
    notes = RowNotes()
    source = open_source(str(HH), "train", key="k")
    groups = list(read_groups(source, pairing="best-vs-rest", min_margin=0.0, strict=False, notes=notes))
    assert (len(groups), notes.drops) == (2312 - 4, {"empty_completion": 4})
    assert all(str(group.prompt).endswith("\n\nAssistant:") for group in groups)
