"""report.html: complete in one file, escaped, without scripts and without requests."""

import re
from html.parser import HTMLParser

import pytest
from nasty import NASTY, nasty_report

from dpo.report.content import Provenance, Report
from dpo.report.figures import INK
from dpo.report.html import html_page


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


def test_text_of_models_stays_text(page: str) -> None:
    elements = Elements(page).found
    assert {tag for tag, _ in elements}.isdisjoint({"script", "img", "iframe", "object", "base"})
    assert not [attrs for _, attrs in elements if any(name.startswith("on") for name in attrs)]
    assert "&lt;script&gt;document.title" in page
    assert "{{ 7 * 7 }}" in page
    assert "\x1b" not in page


def test_nothing_is_loaded(page: str) -> None:
    linked = [
        value or ""
        for _, attrs in Elements(page).found
        for name, value in attrs.items()
        if name in ("src", "href", "xlink:href", "data", "action", "srcset")
    ]
    assert linked  # within the figures
    assert all(value.startswith(("#", "data:,")) for value in linked)
    assert not re.search(r"@import|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_every_figure_has_its_caption_and_the_colour_of_the_text(page: str) -> None:
    assert page.count("<svg ") == page.count("<figure ") == 5
    for name in ("training", "rewards", "margins", "score_kl", "lengths"):
        assert f"caption of {name}" in page
    assert INK not in page
    assert "currentColor" in page


def test_ids_are_unique_and_every_reference_has_its_target(page: str) -> None:
    elements = Elements(page).found
    ids = [attrs["id"] for _, attrs in elements if "id" in attrs]
    assert len(ids) == len(set(ids)) > 100
    used = re.findall(r"url\(#([^)]+)\)", page)
    used += [str(attrs["xlink:href"])[1:] for _, attrs in elements if "xlink:href" in attrs]
    assert used
    assert set(used) <= set(ids)


def test_the_table_has_only_the_first_rows(page: str) -> None:
    assert f"<td>{'1 &lt;script&gt;'}" in page
    assert "<td>2 &lt;script&gt;" not in page


def test_the_sections_on_the_data_stand_below_their_own_heading(page: str) -> None:
    assert page.index("<h2>The data</h2>") < page.index("<h3>Lengths</h3>") < page.index("<h2>All numbers")


def test_a_report_without_samples_or_figures_has_no_such_headings() -> None:
    empty = Report(
        summary={"eval/loss": 0.5},
        rows=[],
        table_rows=3,
        provenance=Provenance(essentials={}, commands=["x"]),
    )
    page = html_page(empty, "runs/a")
    for heading in ("Samples", "Figures", "Where it fails", "What was compared", "Versions"):
        assert f"<h2>{heading}" not in page
    assert "<h2>The data" not in page
    assert "<h2>All numbers</h2>" in page
