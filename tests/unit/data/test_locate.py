"""Which files of a folder are a split, in the layouts in which people keep data sets."""

import json
from pathlib import Path

import pytest

from dpo.data.locate import files_of, split_files, splits_of, suffix_of

SHARDS = [f"train-{n:05}-of-00002.parquet" for n in range(2)]


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["train.parquet", "test.parquet", "manifest.json"], "test", ["test.parquet"]),
        ([*SHARDS[::-1], "test-00000-of-00001.parquet", "README.md"], "train", SHARDS),
        ([f"data/{name}" for name in SHARDS], "train", [f"data/{name}" for name in SHARDS]),
        (["train_prefs-00000-of-00001.parquet", "train_sft.parquet"], "train", []),
        (["train_prefs-00000-of-00001.parquet"], "train_prefs", ["train_prefs-00000-of-00001.parquet"]),
        (["train/b.jsonl", "train/a.jsonl", "test/a.jsonl"], "train", ["train/a.jsonl", "train/b.jsonl"]),
        (["train_1.jsonl.gz", "train_2.jsonl.gz"], "train", ["train_1.jsonl.gz", "train_2.jsonl.gz"]),
        (["part-0.jsonl", "part-1.jsonl"], "train", ["part-0.jsonl", "part-1.jsonl"]),
        (["part-0.jsonl", "part-1.jsonl"], "test", ["part-0.jsonl", "part-1.jsonl"]),
        (["part-0.jsonl", "test.jsonl"], "train", []),  # what part-0 is nobody says
        (["notes.txt", "state.json", "dataset_info.json"], "train", []),
        (["train.CSV"], "train", ["train.CSV"]),
        (["deep/er/train.jsonl"], "train", []),
    ],
)
def test_the_files_of_a_split(names: list[str], split: str, found: list[str]) -> None:
    assert split_files(names, split, whole=True) == found


def test_a_folder_without_names_of_splits_is_no_split_beside_another() -> None:
    assert split_files(["part-0.jsonl"], "test", whole=False) == []


def test_several_formats_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\.jsonl, \.parquet"):
        split_files(["train.jsonl", "train.parquet"], "train", whole=True)
    assert split_files(["train.parquet", "test.jsonl"], "train", whole=True) == ["train.parquet"]


def test_splits_for_messages() -> None:
    names = [
        *SHARDS,
        "test.parquet",
        "dev/x.jsonl",
        "manifest.json",
        "data/validation-00000-of-00001.parquet",
    ]
    assert splits_of(names) == ["dev", "test", "train", "validation"]


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("a.jsonl", ".jsonl"),
        ("a.json.gz", ".json.gz"),
        ("a.tar.gz", None),
        ("a.txt", None),
        ("a.PARQUET", ".parquet"),
    ],
)
def test_endings(name: str, suffix: str | None) -> None:
    assert suffix_of(name) == suffix


def test_what_datasets_saved_is_read_in_its_order(tmp_path: Path) -> None:
    train = tmp_path / "train"
    train.mkdir()
    listed = [{"filename": name} for name in ("data-1.arrow", "data-0.arrow")]
    (train / "state.json").write_text(json.dumps({"_data_files": listed}))
    (tmp_path / "dataset_dict.json").write_text("{}")
    assert files_of(tmp_path, "train", whole=True) == [train / "data-1.arrow", train / "data-0.arrow"]
    assert files_of(tmp_path, "test", whole=True) == []
    assert files_of(train, "test", whole=True) == [train / "data-1.arrow", train / "data-0.arrow"]
    assert files_of(train, "test", whole=False) == []


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"_data_files": [1]}'])
def test_a_damaged_description_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        files_of(tmp_path, "train", whole=True)
