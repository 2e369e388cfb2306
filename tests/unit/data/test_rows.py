"""One row in each format, and one with each fault."""

import json
import math
from typing import Any

import pytest

from dpo.data.fields import RowError
from dpo.data.notes import RowNotes
from dpo.data.records import Message, Pair
from dpo.data.rows import convert_rows, group_from_row
from dpo.errors import UserError

USER = {"role": "user", "content": "Hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}


def test_a_plain_pair_is_a_group_of_two() -> None:
    group = group_from_row({"prompt": "p", "chosen": " good", "rejected": " bad", "id": 7})
    assert (group.prompt, group.completions, group.pairs) == ("p", (" good", " bad"), (Pair(0, 1),))
    assert (group.scores, group.id) == (None, "7")


def test_an_empty_prompt_is_a_prompt() -> None:
    assert group_from_row({"prompt": "", "chosen": "a", "rejected": "b"}).prompt == ""


def test_the_prompt_of_two_dialogues_ends_at_the_last_assistant_marker_they_share() -> None:
    shared = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    group = group_from_row({"chosen": f"{shared} The sun", "rejected": f"{shared} The sea"})
    assert (group.prompt, group.completions) == (shared, (" The sun", " The sea"))


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "completions"),
    [
        ("The cat is good", "The cat is gone", "The cat is", (" good", " gone")),
        ("Question?\nYes", "Question?\nNo", "Question?\n", ("Yes", "No")),
        ("a b", "a b c", "a", (" b", " b c")),
    ],
)
def test_other_texts_are_split_between_words(
    chosen: str, rejected: str, prompt: str, completions: tuple[str, str]
) -> None:
    group = group_from_row({"chosen": chosen, "rejected": rejected})
    assert (group.prompt, group.completions) == (prompt, completions)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "Hi", "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": [USER], "completions": [[YES], [NO]], "pairs": [{"chosen": 0, "rejected": 1}]},
        {"prompt": [{**USER, "name": None}], "completions": ["yes", "no"], "pairs": [[0, 1]]},
        {
            "prompt": [{**USER, "content": [{"type": "text", "text": "Hi"}]}],
            "chosen": [YES],
            "rejected": [NO],
        },
    ],
)
def test_every_format_of_a_chat_gives_the_same_group(row: dict[str, Any]) -> None:
    group = group_from_row(row)
    assert group.prompt == (Message(role="user", content="Hi"),)
    assert (group.completions, group.pairs) == (("yes", "no"), (Pair(0, 1),))


def test_scores_become_pairs_by_the_rule_and_are_kept() -> None:
    row = {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 3, 2.5]}
    assert group_from_row(row, pairing="all", min_margin=0.6).pairs == (Pair(1, 0), Pair(2, 0))
    assert group_from_row(row).scores == (1.0, 3.0, 2.5)


def test_given_pairs_have_priority_over_scores() -> None:
    row = {
        "prompt": "p",
        "completions": ["a", "b"],
        "scores": [1, 3],
        "pairs": [{"chosen": 0, "rejected": 1}],
    }
    assert group_from_row(row).pairs == (Pair(0, 1),)


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    ("columns", "turns"),
    [
        ({"question": "Hi"}, [USER]),
        ({"system": "Be brief.", "question": "Hi"}, [SYSTEM, USER]),
        ({"system": "", "question": "Hi"}, [USER]),
        ({"system": None, "input": "Hi"}, [USER]),
        ({"system": "Be brief.", "prompt": "Hi"}, [SYSTEM, USER]),
        ({"system": "Be brief.", "prompt": [USER]}, [SYSTEM, USER]),
        ({"system": "Be brief.", "prompt": [SYSTEM, USER]}, [SYSTEM, USER]),
        ({"instruction": "Hi"}, [USER]),
        ({"instruction": "Hi", "input": ""}, [USER]),
        ({"instruction": "Add.", "input": "1 + 1"}, [{"role": "user", "content": "Add.\n1 + 1"}]),
    ],
)
def test_columns_of_orca_and_alpaca_become_turns(
    columns: dict[str, Any], turns: list[dict[str, str]]
) -> None:
    for answers in (("yes", "no"), ([YES], [NO])):
        group = group_from_row({**columns, "chosen": answers[0], "rejected": answers[1]})
        assert group.prompt == tuple(turns)
        assert group.completions == ("yes", "no")
    row = {**columns, "completions": ["yes", "no"], "pairs": [[0, 1]]}
    assert group_from_row(row).prompt == tuple(turns)


def test_an_empty_system_column_leaves_a_text_prompt_as_it_was() -> None:
    row = {"system": "", "prompt": "p", "chosen": "a", "rejected": "b"}
    assert group_from_row(row).prompt == "p"


def test_columns_that_hold_something_and_are_not_read_are_counted() -> None:
    notes = RowNotes()
    row = {"prompt": "p", "chosen": "a", "rejected": "b", "id": 1, "messages": [USER], "n": 0, "note": "x"}
    group_from_row({**row, "empty": [], "null": None, "blank": ""}, notes=notes)
    group_from_row({**row, "messages": None, "n": None, "question": "q"}, notes=notes)
    assert notes.ignored == {"messages": 1, "n": 1, "note": 2, "question": 1}


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def called(*calls: Any, content: Any = None, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, "tool_calls": list(calls), **fields}


def test_completions_that_differ_only_in_a_call_or_in_their_reasoning_are_a_pair() -> None:
    other = {"type": "function", "function": {"name": "g", "arguments": {"x": 1}}}
    group = group_from_row({"prompt": [USER], "chosen": [called(CALL)], "rejected": [called(other)]})
    assert group.completions == ("", "")
    assert group.message_fields == ({"tool_calls": [CALL]}, {"tool_calls": [other]})
    thoughts = [{**YES, "reasoning_content": text} for text in ("hm", "ah")]
    group = group_from_row({"prompt": [USER], "chosen": thoughts[:1], "rejected": thoughts[1:]})
    assert group.completions == ("yes", "yes")
    with pytest.raises(RowError) as error:
        group_from_row({"prompt": [USER], "chosen": [called(CALL)], "rejected": [called(CALL)]})
    assert error.value.reason == "identical_completions"


def test_tools_and_arguments_of_the_template_go_with_the_row_also_as_json() -> None:
    tools = [{"type": "function", "function": {"name": "f", "strict": None}}]
    row = {
        "prompt": [USER],
        "chosen": "yes",
        "rejected": "no",
        "chat_template_kwargs": {"enable_thinking": False},
    }
    expected = {"tools": [{"type": "function", "function": {"name": "f"}}], "enable_thinking": False}
    assert group_from_row({**row, "tools": tools}).template_fields == expected
    as_json = {"tools": json.dumps(tools), "chat_template_kwargs": json.dumps(row["chat_template_kwargs"])}
    assert group_from_row({**row, **as_json}).template_fields == expected
    assert group_from_row({**row, "tools": [], "chat_template_kwargs": None}).template_fields == {}


def test_message_fields_that_are_not_used_are_counted_once_per_row() -> None:
    notes = RowNotes()
    turns = [{**USER, "timestamp": 3}, {**YES, "timestamp": 4}, {**USER, "weight": 0}]
    group_from_row({"prompt": turns, "chosen": [{**YES, "id": "x"}], "rejected": [NO]}, notes=notes)
    assert notes.ignored == {"prompt.timestamp": 1, "prompt.weight": 1, "completion.id": 1}


def test_columns_rename_the_fields() -> None:
    row = {"question": "q", "good": "a", "rejected": "b"}
    group = group_from_row(row, columns={"prompt": "question", "chosen": "good"})
    assert (group.prompt, group.completions) == ("q", ("a", "b"))


def _group(**fields: Any) -> dict[str, Any]:
    return {"prompt": "p", "completions": ["a", "b"], **fields}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ([1, 2], "not_an_object"),
        ({"prompt": "p", "chosen": "a"}, "missing_field"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "missing_field"),
        ({"completions": ["a", "b"], "pairs": [[0, 1]]}, "missing_field"),
        (_group(), "missing_field"),
        ({"chosen": [YES], "rejected": [NO]}, "missing_field"),
        ({"chosen": "good", "rejected": "gone"}, "missing_field"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]}, "unusable_field"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b", "tools": "[{"}, "bad_tools"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b", "tools": ["f"]}, "bad_tools"),
        ({"prompt": [USER], "chosen": "a", "rejected": "b", "chat_template_kwargs": [1]}, "bad_tools"),
        ({"prompt": [USER], "chosen": [{**YES, "tool_calls": 1}], "rejected": [NO]}, "bad_tools"),
        ({"prompt": [USER], "chosen": [{**YES, "content": None}], "rejected": [NO]}, "not_text"),
        ({"prompt": [USER], "chosen": [{**YES, "content": []}], "rejected": [NO]}, "not_text"),
        ({"prompt": [{**USER, "name": 3}], "chosen": [YES], "rejected": [NO]}, "not_text"),
        ({"prompt": [{**USER, "images": ["i"]}], "chosen": [YES], "rejected": [NO]}, "unusable_field"),
        (
            {"prompt": [{**USER, "content": [{"type": "image"}]}], "chosen": "a", "rejected": "b"},
            "unusable_field",
        ),
        ({"query": "q", "chosen": "good", "rejected": "bad"}, "missing_field"),
        ({"system": "s", "chosen": "a b", "rejected": "a c"}, "missing_field"),
        ({"system": 3, "prompt": "p", "chosen": "a", "rejected": "b"}, "not_text"),
        ({"instruction": ["Hi"], "chosen": "a", "rejected": "b"}, "not_text"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "images": [{"bytes": b""}]}, "unusable_field"),
        ({"instruction": "p", "history": [["q", "a"]], "chosen": "a", "rejected": "b"}, "unusable_field"),
        (
            {"system": "s", "prompt": [{**USER, "role": "system"}], "chosen": "a", "rejected": "b"},
            "prompts_differ",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": 3}, "not_text"),
        ({"prompt": 3, "chosen": "a", "rejected": "b"}, "not_text"),
        ({"prompt": [{"role": "user"}], "chosen": "a", "rejected": "b"}, "not_text"),
        ({"prompt": [USER], "chosen": [YES], "rejected": "b"}, "not_text"),
        ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "empty_completion"),
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "identical_completions"),
        ({"chosen": [USER, YES], "rejected": [YES, NO]}, "prompts_differ"),
        ({"prompt": [USER], "chosen": [NO, YES], "rejected": [NO, NO]}, "prompts_differ"),
        ({"chosen": [USER, YES], "rejected": [USER, USER]}, "last_turn_not_assistant"),
        ({"prompt": "p", "completions": "ab", "pairs": [[0, 1]]}, "not_a_list"),
        ({"prompt": "p", "completions": ["a"], "pairs": []}, "too_few_completions"),
        (_group(pairs=[]), "no_pairs"),
        (_group(scores=[1.0, 1.0]), "no_pairs"),
        (_group(pairs=[[0, 2]]), "pair_out_of_range"),
        (_group(pairs=[[-1, 0]]), "pair_out_of_range"),
        (_group(pairs=[{"chosen": 0}]), "bad_pairs"),
        (_group(pairs=[[0, True]]), "bad_pairs"),
        (_group(pairs=[[0, 1], [1, 0]]), "pair_both_ways"),
        (_group(completions=["a", "b", "a"], pairs=[[0, 1], [1, 2]]), "pair_both_ways"),
        (_group(completions=["a", "a"], scores=[1, 2]), "identical_completions"),
        (_group(scores=[1]), "bad_scores"),
        (_group(scores=[1, "2"]), "bad_scores"),
        (_group(scores=[1, math.nan]), "scores_not_finite"),
        (_group(scores=[1, math.inf]), "scores_not_finite"),
    ],
)
def test_a_faulty_row_is_refused_for_its_reason(row: Any, reason: str) -> None:
    with pytest.raises(RowError) as error:
        group_from_row(row)
    assert error.value.reason == reason


def test_a_mapped_column_that_a_row_lacks_is_not_replaced_by_an_implied_prompt() -> None:
    with pytest.raises(RowError, match="'quesiton'") as error:
        group_from_row({"question": "q", "chosen": "a b", "rejected": "a c"}, columns={"prompt": "quesiton"})
    assert error.value.reason == "missing_field"


ROWS = [
    ("f:1", {"prompt": "p", "chosen": "a", "rejected": "b"}),
    ("f:2", {"prompt": "p", "chosen": "a", "rejected": ""}),
    ("f:3", {"prompt": "p", "chosen": "", "rejected": "b"}),
    ("f:4", {"prompt": "q", "chosen": "a", "rejected": "b"}),
]


def test_faulty_rows_are_dropped_and_counted() -> None:
    notes = RowNotes()
    groups = convert_rows(ROWS, group_from_row, strict=False, notes=notes)
    assert [group.prompt for group in groups] == ["p", "q"]
    assert notes.drops == {"empty_completion": 2}


def test_strict_makes_the_first_faulty_row_an_error_with_its_place() -> None:
    groups = convert_rows(ROWS, group_from_row, strict=True, notes=RowNotes())
    assert next(groups).prompt == "p"
    with pytest.raises(UserError, match=r"f:2: .*empty_completion"):
        next(groups)
