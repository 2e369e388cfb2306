"""Sources behind URLs and, by the `datasets` library's own loader of a local folder, on the hub."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest
from unit.data.test_sources import ROWS, has_split, open_source, prompts, write_lines

from dpo.errors import UserError


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
    assert prompts(source) == ["p0", "p1", "p2"]
    assert source.completions_are_complete is (False if url == "memory://set" else None)
    monkeypatch.setattr(type(store), "get_file", lambda *_: pytest.fail("copied again"))
    assert open_source(url, "train", key="k") == source
    monkeypatch.undo()
    store.pipe("/set/train.jsonl", json.dumps(ROWS[1]).encode())
    assert prompts(open_source(url, "train", key="k")) == ["p1"]


def test_a_folder_behind_a_url_has_splits(store: Any) -> None:
    assert has_split("memory://set", "test")
    assert not has_split("memory://set", "dev")
    assert not has_split("memory://set/train.jsonl", "test")
    assert prompts(open_source("memory://set", "test", key="k")) == ["p0"]
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
    write_lines(hub / "train.jsonl", ROWS)
    write_lines(hub / "test.jsonl", ROWS[:1])
    source = open_source("some/thing", "test", key="data.test")
    assert (source.files, source.completions_are_complete) == ((), None)
    assert prompts(source) == ["p0"]
    assert has_split("some/thing", "test")
    assert source.fingerprint != open_source("some/thing", "train", key="data.train").fingerprint


def test_the_first_rows_of_a_hub_data_set_are_streamed(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_lines(hub / "train.jsonl", ROWS)
    monkeypatch.setattr("dpo.data.sources.hub_files", lambda *_: pytest.fail("fetched"))
    assert prompts(open_source("some/thing", "train", key="k", rows=2)) == ["p0", "p1"]


def test_a_hub_data_set_has_configurations_with_splits_of_any_name(hub: Path) -> None:
    (hub / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: [{split: train_prefs, path: a.jsonl}]\n"
        "- config_name: two\n  data_files: [{split: train_prefs, path: b.jsonl}]\n---\n"
    )
    write_lines(hub / "a.jsonl", ROWS)
    write_lines(hub / "b.jsonl", ROWS[2:])
    one = open_source("some/thing", "train", key="k", name="one", split="train_prefs")
    two = open_source("some/thing", "train", key="k", name="two", split="train_prefs")
    assert (prompts(one), prompts(two)) == (["p0", "p1", "p2"], ["p2"])
    assert one.fingerprint != two.fingerprint
    with pytest.raises(UserError, match=r"k: .*Config name is missing"):
        open_source("some/thing", "train", key="k", split="train_prefs")


def test_a_hub_data_set_without_the_split_is_an_error_that_names_those_it_has(hub: Path) -> None:
    write_lines(hub / "train.jsonl", ROWS)
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
