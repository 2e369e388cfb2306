"""Messages of a row: text in either form, the fields that go with it, and what is refused."""

from typing import Any

import pytest

from dpo.data.fields import Fields, RowError
from dpo.data.messages import list_of_objects, parsed, read_messages


def read(*turns: Any) -> tuple[Any, ...]:
    return read_messages(Fields({}, {}), list(turns), "prompt")


@pytest.mark.parametrize(
    "content",
    ["Hi there", [{"type": "text", "text": "Hi "}, {"type": "text", "text": "there"}], ["Hi ", "there"]],
)
def test_parts_of_type_text_are_joined(content: Any) -> None:
    assert read({"role": "user", "content": content}) == ({"role": "user", "content": "Hi there"},)


def test_fields_of_the_allow_list_are_kept_and_empty_ones_are_not() -> None:
    turn = {
        "role": "assistant",
        "content": "x",
        "name": "A",
        "reasoning": "r",
        "tool_calls": [],
        "thinking": None,
    }
    assert read(turn) == ({"role": "assistant", "content": "x", "name": "A", "reasoning": "r"},)


def test_a_call_of_a_tool_needs_no_text_and_may_be_json() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": '[{"function": {"name": "f", "x": null}}]'}
    assert read(call) == ({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},)


def test_other_fields_are_left_in_the_row_to_be_named() -> None:
    fields = Fields({}, {})
    read_messages(fields, [{"role": "user", "content": "x", "weight": 1, "empty": ""}], "prompt")
    assert fields.unread() == ["prompt.weight"]


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ("text", "not_text"),
        ({"content": "x"}, "not_text"),
        ({"role": "user", "content": None}, "not_text"),
        ({"role": "user", "content": [{"type": "text"}]}, "not_text"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}, "unusable_field"),
        ({"role": "assistant", "content": "", "function_call": {"name": "f"}}, "unusable_field"),
        ({"role": "assistant", "content": "x", "reasoning_content": ["r"]}, "not_text"),
    ],
)
def test_what_is_no_text_is_refused(turn: Any, reason: str) -> None:
    with pytest.raises(RowError) as error:
        read(turn)
    assert error.value.reason == reason


def test_json_that_is_broken_or_no_list_of_objects_is_refused() -> None:
    assert parsed("[1]", "tools") == [1]
    for value in ("[", [1], "3"):
        with pytest.raises(RowError, match="tools") as error:
            list_of_objects(value, "tools")
        assert error.value.reason == "bad_tools"
