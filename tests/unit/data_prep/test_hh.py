import gzip
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep.cli import main
from data_prep.hh import first_turn, hh_group
from dpo.data.fields import RowError
from dpo.data.records import Message

HH = Path(__file__).resolve().parents[3].parent / "shared" / "data" / "hh-harmless" / "test.jsonl.gz"
SHARED = "\n\nHuman: Hi there\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant:"
ROW = {"chosen": f"{SHARED} The sun.", "rejected": f"{SHARED} The sea."}


def test_text_keeps_the_markers_and_the_space_after_them() -> None:
    group = hh_group(ROW, as_messages=False)
    assert (group.prompt, group.completions) == (SHARED, (" The sun.", " The sea."))
    assert first_turn(group) == "Hi there"


def test_messages_have_roles_and_no_markers() -> None:
    group = hh_group(ROW, as_messages=True)
    assert group.prompt == (
        Message(role="user", content="Hi there"),
        Message(role="assistant", content="Yes?"),
        Message(role="user", content="Why?"),
    )
    assert group.completions == ("The sun.", "The sea.")
    assert first_turn(group) == "Hi there"


@pytest.mark.parametrize(
    ("chosen", "rejected", "as_messages", "reason"),
    [
        # the dialogues differ from the second turn on
        ("\n\nHuman: a\n\nAssistant: b", f"{SHARED} The sea.", False, "not_a_dialogue"),
        (f"{SHARED} x\n\nHuman: y\n\nAssistant: z", f"{SHARED} The sea.", False, "prompts_differ"),
        ("good", "bad", False, "not_a_dialogue"),
        ("\n\nAssistant: a", "\n\nAssistant: b", False, "not_a_dialogue"),
        (f"{SHARED} ", f"{SHARED} The sea.", False, "empty_completion"),
        ("\n\nHuman: \n\nAssistant: a", "\n\nHuman: \n\nAssistant: b", True, "empty_turn"),
        (f"{SHARED} same", f"{SHARED}  same", True, "identical_completions"),
    ],
)
def test_a_row_whose_dialogues_differ_before_the_last_turn_is_refused(
    chosen: str, rejected: str, as_messages: bool, reason: str
) -> None:
    with pytest.raises(RowError) as error:
        hh_group({"chosen": chosen, "rejected": rejected}, as_messages=as_messages)
    assert error.value.reason == reason


def test_test_dialogues_with_the_first_turn_of_a_training_dialogue_are_dropped(tmp_path: Path) -> None:
    other = {key: text.replace("Hi there", "Hello") for key, text in ROW.items()}
    (tmp_path / "train.jsonl").write_text(json.dumps(ROW))
    (tmp_path / "test.jsonl.gz").write_bytes(
        gzip.compress(f"{json.dumps(ROW)}\n{json.dumps(other)}".encode())
    )
    out = tmp_path / "out"
    test = str(tmp_path / "test.jsonl.gz")
    assert main(["hh", str(tmp_path / "train.jsonl"), "--test", test, "--output", str(out)]) == 0
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["rows"] == {"train": 1, "test": 1}
    assert manifest["dropped"] == {"test_prompt_in_train": 1}
    assert [source["name"] for source in manifest["sources"]] == ["train.jsonl", "test.jsonl.gz"]
    (row,) = pq.read_table(out / "test.parquet").to_pylist()
    assert row["prompt"].startswith("\n\nHuman: Hello")


@pytest.mark.skipif(not HH.is_file(), reason="the shared HH-RLHF file is not beside the repository")
@pytest.mark.parametrize("form", ["text", "messages"])
def test_the_real_file_gives_every_valid_pair_and_no_first_turn_in_both_splits(
    tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """2,312 rows: 5 differ before the last assistant turn, and 4 have an empty completion."""
    assert main(["hh", str(HH), "--output", str(tmp_path / "out"), "--format", form]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["dropped"] == {"prompts_differ": 5, "empty_completion": 4}
    assert manifest["pairs"] == sum(manifest["rows"].values()) == 2312 - 9
    assert manifest["completions_are_complete"] is True
    assert 150 < manifest["rows"]["test"] < 310  # 230 expected; rows with the same first turn stay together
    first_turns = []
    for split in ("train", "test"):
        prompts = pq.read_table(tmp_path / "out" / f"{split}.parquet")["prompt"].to_pylist()
        if form == "text":
            assert all(prompt.endswith("\n\nAssistant:") for prompt in prompts)
            first_turns.append({prompt.split("\n\nAssistant:")[0] for prompt in prompts})
        else:
            first_turns.append({prompt[0]["content"] for prompt in prompts})
    assert not first_turns[0] & first_turns[1]
    assert "2,303 pairs" in capsys.readouterr().out
