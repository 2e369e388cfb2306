"""Columns under our names, what was not read, and what cannot be left out."""

import pytest

from dpo.data.fields import Fields, RowError, as_list, brief, holds


def test_a_field_is_found_under_the_datas_own_name_and_is_then_read() -> None:
    fields = Fields({"question": "q", "prompt": "p", "x": 1}, {"prompt": "question"})
    assert (fields.get("prompt"), fields.needed("prompt"), fields.text("prompt")) == ("q", "q", "q")
    assert fields.unread() == ["prompt", "x"]


def test_a_missing_field_is_named_with_what_the_row_has() -> None:
    with pytest.raises(RowError, match=r"'good'.*'bad', 'question'") as error:
        Fields({"question": "q", "bad": "b"}, {"chosen": "good"}).needed("chosen")
    assert error.value.reason == "missing_field"


def test_a_column_that_cannot_be_left_out_is_refused_unless_it_is_read() -> None:
    fields = Fields({"history": "h", "images": []}, {"prompt": "history"})
    with pytest.raises(RowError, match="'history'"):
        fields.unread()
    fields.get("prompt")
    assert fields.unread() == []


@pytest.mark.parametrize(
    ("value", "expected"), [(0, True), ("x", True), (None, False), ("", False), ({}, False)]
)
def test_absent_values_hold_nothing(value: object, expected: bool) -> None:
    assert holds(value) is expected


def test_values_of_a_wrong_type_are_refused() -> None:
    with pytest.raises(RowError) as error:
        Fields({"system": 3}, {}).text("system")
    assert error.value.reason == "not_text"
    with pytest.raises(RowError) as error:
        as_list("ab", "pairs")
    assert error.value.reason == "not_a_list"
    with pytest.raises(RowError) as error:
        Fields([1], {})
    assert error.value.reason == "not_an_object"
    assert len(brief("x" * 200)) == 80
