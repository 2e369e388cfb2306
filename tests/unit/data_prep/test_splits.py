import argparse
from typing import Any

import pytest

from data_prep.files import Split
from data_prep.splits import Fold, prompt_key, source_of, split_groups, split_of
from dpo.config import DataSource
from dpo.data.notes import RowNotes
from dpo.data.records import Message, Pair, PreferenceGroup
from dpo.data.rows import group_from_row
from dpo.errors import UserError


def _rows(*prompts: str) -> list[tuple[str, Any]]:
    return [(f"f:{p}", {"prompt": p, "chosen": "a", "rejected": "b"}) for p in prompts]


def _split(
    rows: dict[Split, Any], notes: RowNotes, max_rows: int | None = None, fold: Fold | None = None
) -> list[tuple[Split, str | tuple[Message, ...]]]:
    args = argparse.Namespace(strict=False, max_rows=max_rows, seed=0, test_fraction=0.3, fold=fold)
    groups = split_groups(rows, group_from_row, prompt_key, args=args, notes=notes)
    return [(split, group.prompt) for split, group in groups]


def test_a_share_of_the_prompts_is_held_out_and_a_repeated_prompt_stays_together() -> None:
    prompts = [str(number) for number in range(1000)]
    notes = RowNotes()
    splits = _split({"train": _rows(*prompts, *prompts)}, notes)
    assert len(splits) == 2000
    assert splits[:1000] == splits[1000:]
    # 300 expected of 1000, standard deviation 14.5
    assert 240 < sum(split == "test" for split, _ in splits[:1000]) < 360
    assert not notes.drops


def test_the_split_of_a_prompt_does_not_depend_on_the_other_rows() -> None:
    prompts = [str(number) for number in range(50)]
    forward = _split({"train": _rows(*prompts)}, RowNotes())
    backward = _split({"train": _rows(*reversed(prompts))}, RowNotes())
    assert sorted(forward) == sorted(backward)


def test_another_seed_holds_out_other_prompts() -> None:
    first, second = (
        [split_of(str(number), seed=seed, held_out=(0.0, 0.5)) for number in range(64)] for seed in (0, 1)
    )
    assert first != second


def test_no_fraction_holds_out_nothing() -> None:
    assert {split_of(str(number), seed=0, held_out=(0.0, 0.0)) for number in range(100)} == {"train"}


def test_folds_hold_out_every_prompt_once_and_are_of_about_equal_size() -> None:
    prompts = [str(number) for number in range(1000)]
    held_out = [
        [
            prompt
            for split, prompt in _split({"train": _rows(*prompts)}, RowNotes(), fold=Fold(number, 5))
            if split == "test"
        ]
        for number in range(1, 6)
    ]
    assert sorted(prompt for fold in held_out for prompt in fold) == sorted(prompts)
    assert all(150 < len(fold) < 250 for fold in held_out)  # 200 expected, standard deviation 12.6


def test_test_rows_with_a_training_prompt_are_dropped_and_counted() -> None:
    notes = RowNotes()
    splits = _split({"train": _rows("a", "b"), "test": _rows("b", "c", "b")}, notes)
    assert splits == [("train", "a"), ("train", "b"), ("test", "c")]
    assert notes.drops == {"test_prompt_in_train": 2}


def test_rows_with_what_preference_files_cannot_hold_are_dropped_and_counted() -> None:
    named = [{"role": "user", "content": "a", "name": "Ann"}]
    call = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}]
    user = [{"role": "user", "content": "a"}]
    plain = {"role": "assistant", "content": "no"}
    rows = [
        {"prompt": named, "chosen": "yes", "rejected": "no"},
        {"prompt": user, "chosen": call, "rejected": [plain]},
        {"prompt": user, "chosen": "yes", "rejected": "no", "tools": [{"name": "f"}]},
        {"chosen": [*user, plain, plain], "rejected": [*user, plain, {**plain, "content": "yes"}]},
        {"prompt": user, "chosen": "yes", "rejected": "no"},
    ]
    notes = RowNotes()
    assert len(_split({"train": [(f"f:{n}", row) for n, row in enumerate(rows, 1)]}, notes)) == 1
    assert notes.drops == {"fields_not_in_files": 4}
    assert notes.first["fields_not_in_files"].startswith("f:1: the row has name;")


def test_max_rows_limits_each_input_split() -> None:
    splits = _split({"train": _rows("a", "b", "c"), "test": _rows("d", "e", "f")}, RowNotes(), max_rows=2)
    assert splits == [("train", "a"), ("train", "b"), ("test", "d"), ("test", "e")]


def test_equal_chats_have_equal_keys() -> None:
    def group(content: str) -> PreferenceGroup:
        prompt = (Message(role="user", content=content),)
        return PreferenceGroup(prompt=prompt, completions=("a", "b"), pairs=(Pair(0, 1),))

    assert prompt_key(group("x")) == prompt_key(group("x")) != prompt_key(group("y"))


def test_an_input_may_have_the_options_of_a_source() -> None:
    assert source_of("a.jsonl") == DataSource(path="a.jsonl")
    assert source_of("{path: org/data, split: train_prefs, rows: 9}") == DataSource(
        path="org/data", split="train_prefs", rows=9
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{path: a, splt: x}", "splt"),
        ("{path: a", "expected"),
        ("{path: a, weight: 2}", "input: weight: 2; training takes weights"),
        ("{path: a, columns: {prompt: q}}", "input: columns: .*give --columns"),
    ],
)
def test_an_option_that_an_input_does_not_have_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        source_of(text)
