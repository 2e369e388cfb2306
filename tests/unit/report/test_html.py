"""report.html: complete in one file, escaped, and without anything that runs or loads."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from nasty import NASTY, figures, nasty_report

from dpo.report.content import Report
from dpo.report.figures import INK, histogram_before_and_after, inline_svg
from dpo.report.html import headline_cards, html_page
from dpo.report.markdown import write_report


class Elements(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page() -> str:
    return html_page(nasty_report(), f"runs/{NASTY}")


def test_what_models_write_stays_text(page: str) -> None:
    elements = Elements(page).found
    assert {tag for tag, _ in elements}.isdisjoint({"script", "img", "iframe", "object", "base"})
    assert not [attrs for _, attrs in elements if any(name.startswith("on") for name in attrs)]
    assert "&lt;script&gt;document.title" in page
    assert "{{ 7 * 7 }}" in page
    assert "\x1b" not in page


def test_nothing_is_loaded_from_anywhere(page: str) -> None:
    linked = [
        value or ""
        for _, attrs in Elements(page).found
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href", "data", "action", "srcset")
    ]
    assert linked  # the figures' own parts
    assert all(value.startswith(("#", "data:,")) for value in linked)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_every_figure_is_there_with_its_caption_and_takes_the_colour_of_the_text(page: str) -> None:
    assert page.count("<svg ") == page.count("<figure ") == 4
    for name in ("training", "rewards", "margins", "score_kl"):
        assert f"caption of {name}" in page
    assert INK not in page
    assert "currentColor" in page


def test_no_two_elements_share_an_id_and_every_reference_finds_its_own(page: str) -> None:
    elements = Elements(page).found
    ids = [attrs["id"] for _, attrs in elements if "id" in attrs]
    assert len(ids) == len(set(ids)) > 100
    used = re.findall(r"url\(#([^)]+)\)", page)
    used += [str(attrs["xlink:href"])[1:] for _, attrs in elements if "xlink:href" in attrs]
    assert used
    assert set(used) <= set(ids)


def test_the_table_has_the_first_rows_only(page: str) -> None:
    assert f"<td>{'1 &lt;script&gt;'}" in page
    assert "<td>2 &lt;script&gt;" not in page


def test_a_report_without_samples_or_figures_has_no_such_headings() -> None:
    empty = Report(summary={"eval/loss": 0.5}, rows=[], table_rows=3, essentials={}, commands=["x"])
    page = html_page(empty, "runs/a")
    for heading in ("Samples", "Figures", "Where it fails", "What was compared", "Versions"):
        assert f"<h2>{heading}" not in page
    assert "<h2>All numbers</h2>" in page


def test_the_cards_answer_what_is_known() -> None:
    assert headline_cards({"eval/loss": 0.5}) == []
    found = headline_cards(
        {
            "eval/rewards/accuracies": 0.9,
            "eval/rewards/accuracies/low": 0.85,
            "eval/rewards/accuracies/high": 0.95,
        }
    )
    assert [card.answer for card in found] == ["90.0%"]


def test_figures_are_written_beside_the_report_and_shown_by_it(tmp_path: Path) -> None:
    write_report(nasty_report(), tmp_path)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"training.png", "rewards.png", "margins.png", "score_kl.png"}
    assert (tmp_path / "figures/margins.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report.md").read_text()
    assert "![training](figures/training.png)\n\ncaption of training" in text


def test_the_same_numbers_draw_the_same_figure() -> None:
    first, second = (inline_svg(figures()[0].figure, "training") for _ in range(2))
    assert first == second


def test_distributions_without_spread_can_be_drawn() -> None:
    figure = histogram_before_and_after([1.0, 1.0], [1.0], title="t", unit="u", counted="c")
    assert inline_svg(figure, "a").startswith("<svg ")
