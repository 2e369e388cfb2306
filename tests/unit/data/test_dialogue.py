"""Prompt and completions of a row, wherever they stand in it; the formats as a whole are in test_rows."""

import json
from typing import Any

import pytest

from dpo.data.dialogue import Dialogue, read_dialogue
from dpo.data.fields import Fields, RowError
from dpo.data.notes import RowNotes

HI = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}


def read(row: dict[str, Any], *values: Any, notes: RowNotes | None = None) -> Dialogue:
    return read_dialogue(Fields(row, {}), values, notes or RowNotes(), may_imply=notes is not None)


def test_a_group_must_name_its_prompt_and_a_pair_may_imply_it() -> None:
    with pytest.raises(RowError) as error:
        read({}, "a b", "a c")
    assert error.value.reason == "missing_field"
    notes = RowNotes()
    assert read({}, "a b", "a c", notes=notes)[:2] == ("a", (" b", " c"))
    assert (notes.implied, notes.implied_example) == (1, "a")


def test_a_dialogue_with_markers_is_not_counted_as_implied_by_words() -> None:
    notes = RowNotes()
    read({}, "\n\nHuman: a\n\nAssistant: b", "\n\nHuman: a\n\nAssistant: c", notes=notes)
    assert notes.implied == 0


def test_fields_of_the_last_message_stay_with_the_completion() -> None:
    found = read({"prompt": [HI]}, [{**YES, "reasoning": "r"}], [NO])
    assert found == ((HI,), ("yes", "no"), ({"reasoning": "r"}, {}), False, ())
    assert read({"prompt": [HI]}, [YES], [NO]).message_fields == ()


def test_a_blank_completion_is_refused_unless_it_calls_a_tool() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert read({"prompt": [HI]}, [call], [NO]).completions == ("", "no")
    with pytest.raises(RowError) as error:
        read({"prompt": [HI]}, [{**YES, "content": " "}], [call])
    assert error.value.reason == "empty_completion"


LONG = "Once upon a time there was"


def test_completions_that_repeat_a_text_prompt_have_it_once() -> None:
    notes = RowNotes()
    found = read({"prompt": LONG}, f"{LONG} a cat", f"{LONG} a mat", notes=notes)
    assert (found.prompt, found.completions, notes.repeated) == (LONG, (" a cat", " a mat"), 1)


@pytest.mark.parametrize(
    ("prompt", "values"),
    [
        ("Hi", ("Hi there", "Hi you")),  # may be chance
        (LONG, (f"{LONG} a cat", " a mat")),
        (LONG, (f"{LONG} a cat", LONG)),
        ([{"role": "user", "content": LONG}], (f"{LONG} a cat", f"{LONG} a mat")),  # an answer to it
    ],
)
def test_other_completions_stay_as_they_are(prompt: Any, values: tuple[str, str]) -> None:
    notes = RowNotes()
    assert read({"prompt": prompt}, *values, notes=notes).completions == values
    assert notes.repeated == 0


def test_messages_that_are_stored_as_json_are_messages() -> None:
    found = read({"prompt": json.dumps([HI])}, json.dumps([YES]), json.dumps([NO]))
    assert found == read({"prompt": [HI]}, [YES], [NO])
    plain = read({"prompt": "[1] is a list"}, "[2]", '[{"a": 1}]')
    assert (plain.prompt, plain.completions) == ("[1] is a list", ("[2]", '[{"a": 1}]'))
    with pytest.raises(RowError) as error:
        read({"prompt": str([HI])}, "yes", "no")
    assert error.value.reason == "not_text"


@pytest.mark.parametrize(
    ("row", "values", "continues"),
    [
        ({"prompt": [HI, YES]}, ("yes", "no"), True),
        ({"prompt": [HI, YES]}, ([YES], [NO]), True),
        ({"prompt": [HI]}, ("yes", "no"), False),
        ({"prompt": [HI, YES]}, ([HI, YES, YES], [HI, YES, NO]), False),  # a turn of its own
        ({}, ([HI, YES, YES], [HI, YES, NO]), False),
        ({"prompt": [HI, {**YES, "tool_calls": [{"name": "f"}]}]}, ("yes", "no"), False),
    ],
)
def test_a_prompt_that_ends_with_the_assistant_is_continued_unless_the_turn_is_closed(
    row: dict[str, Any], values: tuple[Any, Any], continues: bool
) -> None:
    assert read(row, *values, notes=RowNotes()).continues is continues
