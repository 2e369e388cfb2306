"""Sources on disk, behind URLs and, by the `datasets` library's own loader of a local folder, on the hub."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
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


def _prompts(source: PreferenceSource) -> list[Any]:
    groups = read_groups(
        read_rows(source), pairing="best-vs-rest", min_margin=0.0, strict=True, notes=RowNotes()
    )
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
    with pytest.raises(UserError, match=r"data\.train: .*no files of the split test, but of train"):
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
    groups = read_groups(read_rows(source), pairing="all", min_margin=0.0, strict=False, notes=RowNotes())
    with pytest.raises(UserError, match=r"data\.jsonl:5: "):
        list(groups)


def test_rows_before_a_broken_line_have_already_been_read(tmp_path: Path) -> None:
    path = _write_lines(tmp_path / "data.jsonl", ROWS[:1])
    path.write_text(path.read_text() + "{broken\n")
    source = open_source(str(path), "train", key="k")
    groups = read_groups(read_rows(source), pairing="all", min_margin=0.0, strict=False, notes=RowNotes())
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
    assert _prompts(open_source(path, "train", key="k")) == ["p0", "p1", "p2"]
    assert not has_split(path, "test")


def test_any_split_and_its_counterpart(tmp_path: Path) -> None:
    for split, rows in (("train_prefs", ROWS), ("test_prefs", ROWS[:1]), ("train", ROWS[1:])):
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}-00000-of-00001.parquet")
    path = str(tmp_path)
    assert _prompts(open_source(path, "train", key="k", split="train_prefs")) == ["p0", "p1", "p2"]
    assert counterpart(DataSource(path=path, split="train_prefs", weight=2.0, rows=1)) == DataSource(
        path=path, split="test_prefs"
    )
    assert counterpart(DataSource(path=path)) is None  # there is no test
    assert counterpart(DataSource(path=path, split="test_prefs")) is None
    with pytest.raises(UserError, match="no files of the split dev, but of test_prefs, train, train_prefs"):
        open_source(path, "train", key="k", split="dev")


def test_the_names_of_columns_and_the_number_of_rows_are_options(tmp_path: Path) -> None:
    path = str(_write_lines(tmp_path / "data.jsonl", ROWS))
    whole, first = open_source(path, "train", key="k"), open_source(path, "train", key="k", rows=2)
    assert _prompts(first) == ["p0", "p1"]
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
    path = str(_write_lines(tmp_path / "data.jsonl", ROWS))
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
    _write_lines(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.txt").touch()
    with pytest.raises(UserError, match=r"files with \.jsonl, \.txt"):
        open_source(f"{tmp_path}/*", "train", key="k")


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    with pytest.raises(UserError, match=r"no files of the split train, nor any that ends with \.parquet"):
        open_source(str(tmp_path), "train", key="k")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A store behind memory://, and a working folder for the copies."""
    monkeypatch.chdir(tmp_path)
    memory = fsspec.filesystem("memory")
    memory.pipe("/set/train.jsonl", "".join(f"{json.dumps(row)}\n" for row in ROWS).encode())
    memory.pipe("/set/test.jsonl", json.dumps(ROWS[0]).encode())
    memory.pipe("/set/manifest.json", b'{"completions_are_complete": false}')
    yield memory
    memory.rm("/set", recursive=True)


@pytest.mark.parametrize("url", ["memory://set", "memory://set/train.jsonl", "memory://set/tr*.jsonl"])
def test_what_a_url_names_is_copied_once_and_again_when_it_changes(
    store: Any, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(url, "train", key="k")
    assert _prompts(source) == ["p0", "p1", "p2"]
    assert source.completions_are_complete is (False if url == "memory://set" else None)
    monkeypatch.setattr(type(store), "get_file", lambda *_: pytest.fail("copied again"))
    assert open_source(url, "train", key="k") == source
    monkeypatch.undo()
    store.pipe("/set/train.jsonl", json.dumps(ROWS[1]).encode())
    assert _prompts(open_source(url, "train", key="k")) == ["p1"]


def test_a_folder_behind_a_url_has_splits(store: Any) -> None:
    assert has_split("memory://set", "test")
    assert not has_split("memory://set", "dev")
    assert not has_split("memory://set/train.jsonl", "test")
    assert _prompts(open_source("memory://set", "test", key="k")) == ["p0"]
    with pytest.raises(
        UserError, match=r"k: memory://set: it has no files of the split dev, only of test, train"
    ):
        open_source("memory://set", "train", key="k", split="dev")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("memory://nothing", "k: memory://nothing has no files"),
        ("nothing://bucket/x", "k: nothing://bucket/x: Protocol not known"),
        ("s3://bucket/x.jsonl", "k: s3://bucket/x.jsonl: .*s3fs"),
        ("http://localhost:1/x.jsonl", "k: http://localhost:1/x.jsonl"),
    ],
)
def test_a_url_that_cannot_be_read_is_an_error(store: Any, url: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        open_source(url, "train", key="k")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder under the hub name some/thing; `datasets` reads it as if it were on the hub."""
    folder = tmp_path / "repository"
    folder.mkdir()
    local = {"some/thing": str(folder)}
    for function in ("load_dataset_builder", "load_dataset", "get_dataset_split_names"):
        original = getattr(datasets, function)

        def at_home(path: str, *arguments: Any, original: Any = original, **options: Any) -> Any:
            return original(local[path], *arguments, **options)

        monkeypatch.setattr(datasets, function, at_home)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("dpo.data.hub._reach_hub", lambda path: None)
    return folder


def test_a_hub_data_set_is_fetched_by_split(hub: Path) -> None:
    _write_lines(hub / "train.jsonl", ROWS)
    _write_lines(hub / "test.jsonl", ROWS[:1])
    source = open_source("some/thing", "test", key="data.test")
    assert (source.files, source.completions_are_complete) == ((), None)
    assert _prompts(source) == ["p0"]
    assert has_split("some/thing", "test")
    assert source.fingerprint != open_source("some/thing", "train", key="data.train").fingerprint


def test_the_first_rows_of_a_hub_data_set_are_streamed(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_lines(hub / "train.jsonl", ROWS)
    monkeypatch.setattr("dpo.data.sources.hub_files", lambda *_: pytest.fail("fetched"))
    assert _prompts(open_source("some/thing", "train", key="k", rows=2)) == ["p0", "p1"]


def test_a_hub_data_set_has_configurations_with_splits_of_any_name(hub: Path) -> None:
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: [{split: train_prefs, path: a.jsonl}]\n"
        "- config_name: two\n  data_files: [{split: train_prefs, path: b.jsonl}]\n---\n"
    )
    _write_lines(hub / "a.jsonl", ROWS)
    _write_lines(hub / "b.jsonl", ROWS[2:])
    one = open_source("some/thing", "train", key="k", name="one", split="train_prefs")
    two = open_source("some/thing", "train", key="k", name="two", split="train_prefs")
    assert (_prompts(one), _prompts(two)) == (["p0", "p1", "p2"], ["p2"])
    assert one.fingerprint != two.fingerprint
    with pytest.raises(UserError, match=r"k: .*Config name is missing"):
        open_source("some/thing", "train", key="k", split="train_prefs")


def test_a_hub_data_set_without_the_split_is_an_error_that_names_those_it_has(hub: Path) -> None:
    _write_lines(hub / "train.jsonl", ROWS)
    assert not has_split("some/thing", "test")
    with pytest.raises(UserError, match=r"data\.test: .*some/thing has no split named test; it has train"):
        open_source("some/thing", "test", key="data.test")


def test_a_hub_that_cannot_be_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: str) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("dpo.data.hub._reach_hub", fail)
    with pytest.raises(UserError, match=r"data\.train: some/thing .*no route to host"):
        open_source("some/thing", "train", key="data.train")
    assert not has_split("some/thing", "test")


@pytest.mark.skipif(not HH.is_file(), reason="the shared HH-RLHF file is not beside the repository")
def test_the_real_hh_file_loses_only_its_four_empty_completions() -> None:
    notes = RowNotes()
    source = open_source(str(HH), "train", key="k")
    groups = list(
        read_groups(read_rows(source), pairing="best-vs-rest", min_margin=0.0, strict=False, notes=notes)
    )
    assert (len(groups), notes.drops) == (2312 - 4, {"empty_completion": 4})
    assert all(str(group.prompt).endswith("\n\nAssistant:") for group in groups)
