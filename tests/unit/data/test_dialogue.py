"""Prompt and completions of a row, wherever they stand in it; the formats as a whole are in test_rows."""

from typing import Any

import pytest

from dpo.data.dialogue import Dialogue, read_dialogue
from dpo.data.fields import Fields, RowError
from dpo.data.notes import RowNotes

HI = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}
NO = {"role": "assistant", "content": "no"}


def read(row: dict[str, Any], *values: Any, notes: RowNotes | None = None) -> Dialogue:
    return read_dialogue(Fields(row, {}), values, notes)


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
    assert found == ((HI,), ("yes", "no"), ({"reasoning": "r"}, {}))
    assert read({"prompt": [HI]}, [YES], [NO]).message_fields == ()


def test_a_blank_completion_is_refused_unless_it_calls_a_tool() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    assert read({"prompt": [HI]}, [call], [NO]).completions == ("", "no")
    with pytest.raises(RowError) as error:
        read({"prompt": [HI]}, [{**YES, "content": " "}], [call])
    assert error.value.reason == "empty_completion"
