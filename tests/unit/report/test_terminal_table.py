"""The table of samples on a terminal: wrapped, within the width, without control characters."""

import pytest
from nasty import NASTY

from dpo.report.content import SampleRow
from dpo.report.terminal_table import terminal_table


def row(index: int = 0, **fields: object) -> SampleRow:
    texts = {"prompt": "It was", "reference": " sad.", "policy": " happy."}
    return SampleRow(index=index, seed=7, **{**texts, **fields})  # type: ignore[arg-type]


def test_cells_are_wrapped_into_columns_of_equal_width() -> None:
    rows = [row(3, prompt="one two three four five", reference_score=-0.5, policy_score=0.75)]
    # 60 columns minus two separators of 3 leave three cells of 18.
    assert terminal_table(rows, 60).splitlines() == [
        "query              | reference policy   | DPO-trained policy",
        "-------------------+--------------------+-------------------",
        "#3                 | -0.50              | +0.75",
        "one two three four |  sad.              |  happy.",
        "five               |                    |",
        "-------------------+--------------------+-------------------",
    ]


@pytest.mark.parametrize("width", [10, 60, 83, 200])
def test_no_line_is_longer_than_the_terminal(width: int) -> None:
    rows = [row(prompt="word " * 50 + "x" * 300, reference=NASTY, policy="")]
    table = terminal_table(rows, width)
    assert max(map(len, table.splitlines())) <= max(width, 60)
    assert "\x1b" not in table


def test_without_scores_there_are_only_texts() -> None:
    assert "#" not in terminal_table([row()], 80)
