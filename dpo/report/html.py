"""Reports as one HTML file each that needs no network and runs no script.

The templates escape everything except the figures, which contain no text of models. A content security policy
forbids scripts and requests, whatever a sample contains.
"""

from collections.abc import Sequence
from typing import Any

import jinja2

from dpo.report.content import COLUMNS, PAIR_COLUMNS, WORST_PAIRS, WORST_SAMPLES, Captioned, Report, Section
from dpo.report.escape import prompt_end, visible
from dpo.report.figures import inline_svg
from dpo.report.headline import headline_cards
from dpo.report.labels import MEASURE_COLUMNS, measures
from dpo.report.reading import reading


def html_page(report: Report, title: str) -> str:
    """The whole of report.html.

    Args:
        report: What was found.
        title: Of the page, such as the run folder.
    """
    return _rendered(
        "page.html",
        title=title,
        report=report,
        cards=headline_cards(report.summary),
        columns=COLUMNS,
        guide=reading(report.summary),
        measure_columns=MEASURE_COLUMNS,
        numbers=measures(report.summary),
        worst_samples=WORST_SAMPLES,
        worst_pairs=WORST_PAIRS,
    )


def data_page(sections: Sequence[Section], *, title: str, command: str) -> str:
    """The whole of the data report's page.

    Args:
        sections: In their order.
        title: Of the page, such as the name of the data.
        command: That made it, as typed in a shell.
    """
    return _rendered("data.html", title=title, sections=sections, command=command)


def _rendered(template: str, **content: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dpo.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
    )
    environment.filters["drawn"] = _drawn
    page = environment.get_template(template)
    return page.render(prompt_end=prompt_end, pair_columns=PAIR_COLUMNS, **content)


def _drawn(captioned: Captioned) -> dict[str, object]:
    """A figure as the template shows it."""
    return {
        "title": captioned.title,
        "caption": captioned.caption,
        "is_wide": captioned.figure.get_figwidth() > 2 * captioned.figure.get_figheight(),
        "svg": inline_svg(captioned.figure, captioned.name),
    }


def _shown(value: object) -> object:
    """What a template prints, without control characters; numbers and markup stay as they are."""
    return visible(value) if type(value) is str else value
