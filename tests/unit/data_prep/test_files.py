import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from data_prep.files import PreferenceWriter, describe_arguments, describe_file
from dpo.data.records import Message, Pair, PreferenceGroup
from dpo.errors import UserError

GROUP = PreferenceGroup(
    prompt="p", completions=(" a", " b", " c"), pairs=(Pair(0, 1), Pair(0, 2)), scores=(2.0, 1.0, 0.5), id="x"
)
CHAT = PreferenceGroup(
    prompt=(Message(role="user", content="Hi"),), completions=("yes", "no"), pairs=(Pair(1, 0),)
)


def _writer(output: Path, *, overwrite: bool = False) -> PreferenceWriter:
    return PreferenceWriter(
        output, overwrite=overwrite, completions_are_complete=False, source={"source": "test"}
    )


def test_a_folder_holds_both_splits_and_a_manifest(tmp_path: Path) -> None:
    with _writer(tmp_path / "out") as writer:
        writer.write_all([("train", GROUP), ("train", GROUP), ("test", GROUP)])
        writer.drops["empty_completion"] += 3
        writer.notes.ignored["margin"] += 2
    rows = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert rows == 2 * [
        {
            "prompt": "p",
            "completions": [" a", " b", " c"],
            "pairs": [{"chosen": 0, "rejected": 1}, {"chosen": 0, "rejected": 2}],
            "labels": None,
            "scores": [2.0, 1.0, 0.5],
            "reference_scores": None,
            "id": "x",
        }
    ]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest.pop("created_with")
    assert manifest == {
        "format_version": 1,
        "source": {"source": "test"},
        "sources": [],
        "rows": {"train": 2, "test": 1},
        "pairs": 6,
        "dropped": {"empty_completion": 3},
        "unused_columns": {"margin": 2},
        "completions_are_complete": False,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_chat_prompt_is_a_list_of_role_and_content(tmp_path: Path) -> None:
    with _writer(tmp_path / "out") as writer:
        writer.write("train", CHAT)
    (row,) = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    assert row["prompt"] == [{"role": "user", "content": "Hi"}]
    assert (row["scores"], row["id"]) == (None, None)
    assert not (tmp_path / "out" / "test.parquet").exists()  # no held-out group, no split


def test_more_groups_than_a_buffer_holds_keep_their_order(tmp_path: Path) -> None:
    with _writer(tmp_path / "out") as writer:
        for number in range(2500):
            writer.write(
                "train", PreferenceGroup(prompt=str(number), completions=("a", "b"), pairs=(Pair(0, 1),))
            )
    prompts = pq.read_table(tmp_path / "out" / "train.parquet")["prompt"].to_pylist()
    assert prompts == [str(number) for number in range(2500)]


def test_text_and_chat_prompts_do_not_mix(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="text prompts and message prompts"),
        _writer(tmp_path / "o") as w,
    ):
        w.write_all([("train", GROUP), ("test", CHAT)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write_and_fail() -> None:
        with _writer(tmp_path / "out") as writer:
            writer.write("train", GROUP)
            (writer.folder / "extra.txt").write_text("more")
            raise error

    with pytest.raises(error):
        write_and_fail()
    assert list(tmp_path.iterdir()) == []


def test_nothing_left_is_an_error_that_counts_the_reasons(tmp_path: Path) -> None:
    writer = _writer(tmp_path / "out")
    writer.drops["empty_completion"] += 4
    writer.notes.drop("not_text", "f:1: x")
    message = r"nothing left after filtering.*empty_completion 4.*\n.*first f:1: x"
    with pytest.raises(UserError, match=message), writer:
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_is_refused_and_replaced_only_by_overwrite(tmp_path: Path) -> None:
    with _writer(tmp_path / "out") as writer:
        writer.write("train", GROUP)
        writer.write("test", GROUP)
    with pytest.raises(UserError, match="is not empty"):
        _writer(tmp_path / "out")
    with _writer(tmp_path / "out", overwrite=True) as writer:
        writer.write("train", GROUP)
        (writer.folder / "extra.txt").write_text("more")
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == [
        "extra.txt",
        "manifest.json",
        "train.parquet",
    ]  # no test.parquet is left
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_failed_overwrite_keeps_what_was_there(tmp_path: Path) -> None:
    with _writer(tmp_path / "out") as writer:
        writer.write("train", GROUP)
    before = (tmp_path / "out" / "train.parquet").read_bytes()
    with pytest.raises(RuntimeError), _writer(tmp_path / "out", overwrite=True):
        raise RuntimeError
    assert (tmp_path / "out" / "train.parquet").read_bytes() == before


def test_overwrite_does_not_touch_a_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="other files"):
        _writer(tmp_path, overwrite=True)


def test_a_file_in_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="is a file"):
        _writer(tmp_path / "out")


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with _writer(tmp_path / "out") as writer:
        writer.write("train", GROUP)
    assert (tmp_path / "out" / "manifest.json").is_file()


def test_a_source_file_is_described_without_its_folder(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_bytes(b"abc")
    digest = hashlib.sha256(b"abc").hexdigest()
    assert describe_file(tmp_path / "data.jsonl") == {"name": "data.jsonl", "bytes": 3, "sha256": digest}


def test_the_manifest_keeps_the_options_but_not_the_output() -> None:
    args: dict[str, Any] = {"source": "hh", "seed": 3, "output": Path("/x"), "overwrite": True}
    assert describe_arguments(argparse.Namespace(**args)) == {"source": "hh", "seed": 3}
