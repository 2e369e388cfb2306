"""How to read a report: a guide for the numbers that it has."""

from unit.report.test_markdown import report

from dpo.report.html import html_page
from dpo.report.labels import LABELS
from dpo.report.markdown import markdown
from dpo.report.reading import READING, reading


def test_every_number_of_the_guide_is_one_of_the_report() -> None:
    assert {*READING} <= LABELS.keys()


def test_only_numbers_that_were_measured_are_explained() -> None:
    assert [row[0] for row in reading({"win_rate": 0.5, "mine": 1.0}).rows] == ["win rate"]
    assert "How to read" not in markdown(report([], summary={"mine": 1.0}))


def test_both_formats_have_the_guide() -> None:
    made = report([])
    for text in (markdown(made), html_page(made, "title")):
        assert "How to read this report" in text
        assert "the scorer is fooled" in text
