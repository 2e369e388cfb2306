import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_prep.cli import main


def _lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def test_renamed_columns_and_scores_become_a_folder(tmp_path: Path) -> None:
    rows = [{"question": f"q{n}", "answers": ["a", "b", "c"], "scores": [1, 2, 3]} for n in range(20)]
    command = ["preferences", _lines(tmp_path / "data.jsonl", rows), "--pairing", "all", "--min_margin", "1"]
    out = tmp_path / "out"
    assert main([*command, "--columns", "prompt=question", "completions=answers", "--output", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert sum(manifest["rows"].values()) == 20
    assert manifest["pairs"] == 20  # of the differences 1, 1 and 2 only the last exceeds the margin
    assert manifest["completions_are_complete"] is True
    row = pq.read_table(out / "train.parquet").to_pylist()[0]
    assert row["pairs"] == [{"chosen": 2, "rejected": 0}]


def test_a_prepared_folder_keeps_its_test_split_and_its_kind_of_completions(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(30)]
    path = _lines(tmp_path / "data.jsonl", rows)
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["preferences", path, "--completions", "fragments", "--output", str(first)]) == 0
    assert main(["preferences", str(first), "--output", str(second)]) == 0
    manifests = [json.loads((folder / "manifest.json").read_text()) for folder in (first, second)]
    assert manifests[0]["rows"] == manifests[1]["rows"]
    assert manifests[1]["completions_are_complete"] is False
    for split in ("train", "test"):
        assert pq.read_table(first / f"{split}.parquet") == pq.read_table(second / f"{split}.parquet")


@pytest.mark.parametrize("mapping", ["prompt", "prompt=", "promt=question", "=x"])
def test_a_malformed_column_mapping_is_an_error(
    tmp_path: Path, mapping: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _lines(tmp_path / "data.jsonl", [])
    command = ["preferences", path, "--columns", mapping, "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "expected FIELD=COLUMN" in capsys.readouterr().err


def test_strict_stops_at_a_faulty_row_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", "chosen": "a", "rejected": "a"}]
    command = ["preferences", _lines(tmp_path / "data.jsonl", rows), "--output", str(tmp_path / "out")]
    assert main([*command, "--strict"]) == 2
    assert "data.jsonl:2: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*command, "--test_fraction", "0"]) == 0
    out = capsys.readouterr().out
    assert "1 train and 0 test groups, 1 pairs" in out
    assert "identical_completions 1" in out


def _prepared(tmp_path: Path) -> Path:
    rows = [{"prompt": f"p{n}", "completions": ["a", "b", "c"], "scores": [1, 3, 2]} for n in range(40)]
    folder = tmp_path / "given"
    assert main(["preferences", _lines(tmp_path / "data.jsonl", rows), "--output", str(folder)]) == 0
    return folder


def _tables(folder: Path) -> list[list[dict[str, Any]]]:
    return [pq.read_table(folder / f"{split}.parquet").to_pylist() for split in ("train", "test")]


def test_flipped_labels_flip_training_pairs_and_not_held_out_pairs(tmp_path: Path) -> None:
    given, flipped = _prepared(tmp_path), tmp_path / "flipped"
    assert main(["preferences", str(given), "--labels", "flipped", "--output", str(flipped)]) == 0
    (train, test), (train_flipped, test_flipped) = _tables(given), _tables(flipped)
    assert test_flipped == test
    assert [row["prompt"] for row in train_flipped] == [row["prompt"] for row in train]
    assert train[0]["pairs"] == [{"chosen": 1, "rejected": 0}, {"chosen": 1, "rejected": 2}]
    assert train_flipped[0]["pairs"] == [{"chosen": 0, "rejected": 1}, {"chosen": 2, "rejected": 1}]
    assert train_flipped[0]["scores"] == [-1, -3, -2]


def test_a_fold_is_refused_where_the_input_has_a_test_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = _prepared(tmp_path)
    command = ["preferences", str(given), "--fold", "1/5", "--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "--fold: the input has a test split" in capsys.readouterr().err
    assert main([*command[:1], str(given / "train.parquet"), *command[2:]]) == 0


def test_labels_are_kept_and_can_be_flipped(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"p{n}", "completion": " a", "label": n % 2 == 0} for n in range(20)
    ]
    rows += [{"prompt": f"q{n}", "completions": [" a", " b"], "labels": [True, False]} for n in range(20)]
    path = _lines(tmp_path / "data.jsonl", rows)
    first, second, flipped = tmp_path / "first", tmp_path / "second", tmp_path / "flipped"
    assert main(["preferences", path, "--output", str(first)]) == 0
    assert main(["preferences", str(first), "--output", str(second)]) == 0
    assert main(["preferences", str(first), "--labels", "flipped", "--output", str(flipped)]) == 0
    kept = pq.read_table(first / "train.parquet").to_pylist()
    given = {row["prompt"]: row.get("labels") or [row["label"]] for row in rows}
    assert len(kept) > 20
    assert all((row["pairs"], row["labels"]) == (None, given[row["prompt"]]) for row in kept)
    assert pq.read_table(second / "train.parquet").to_pylist() == kept
    assert [row["labels"] for row in pq.read_table(flipped / "train.parquet").to_pylist()] == [
        [not label for label in row["labels"]] for row in kept
    ]
    assert json.loads((first / "manifest.json").read_text())["pairs"] == 60
