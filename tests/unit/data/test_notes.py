"""What reading left out, in lines for people."""

from collections import Counter

from dpo.data.notes import RowNotes


def test_a_source_that_is_used_as_a_whole_needs_no_line() -> None:
    notes = RowNotes(rows=3)
    assert (notes.lines("s"), notes.warnings("s")) == ([], [])


def test_unused_columns_are_in_one_line_with_their_rows() -> None:
    notes = RowNotes(rows=3, ignored=Counter(b=2, a=1))
    assert notes.lines("s") == ["s: columns that are not used: a (1 rows), b (2 rows)"]
    assert notes.warnings("s") == []


def test_repeated_prompts_are_counted() -> None:
    assert RowNotes(repeated=2).lines("s") == [
        "s: completions that repeat the prompt, which is taken once: 2 rows"
    ]


def test_options_without_an_effect_are_warnings() -> None:
    (line,) = RowNotes(rows=3, unscored=2).warnings("s")
    assert "min_margin has no effect on 2 of 3 rows" in line
    (line,) = RowNotes(rows=3, paired=2).warnings("s")
    assert "pairing has no effect on 2 of 3 rows" in line


def test_a_loss_of_many_rows_is_a_warning_over_both_steps() -> None:
    assert RowNotes(rows=10, dropped_rows=1, groups=9, dropped_groups=1).warnings("s") == []
    (line,) = RowNotes(rows=10, dropped_rows=2, groups=8, dropped_groups=4).warnings("s")
    assert line.startswith("s: 60% of the rows are dropped")


def test_prompts_that_the_template_does_not_reach_are_warnings() -> None:
    (line,) = RowNotes(groups=5, texts=2).warnings("s")
    assert "2 of 5 prompts are plain text" in line
    (line,) = RowNotes(groups=5, without_system=3).warnings("s")
    assert "system turn of 3 of 5" in line


def test_a_reason_to_drop_is_shown_with_its_number_and_its_first_row() -> None:
    notes = RowNotes()
    for place in ("f:1", "f:7"):
        notes.drop("not_text", f"{place}: chosen is 3")
    assert notes.drops == {"not_text": 2}
    assert notes.lines("f") == notes.drop_lines("f") == ["f: dropped 2 as not_text, first f:1: chosen is 3"]


def test_an_implied_prompt_is_in_order_unless_another_column_may_be_the_prompt() -> None:
    assert RowNotes(rows=3, implied=2, implied_example="The").warnings("s") == []
    (line,) = RowNotes(rows=3, implied=2, implied_example="The", ignored=Counter(query=2)).warnings("s")
    assert "2 of 3 rows" in line
    assert "'The'" in line
