"""report.html: the report as one file that needs no network and runs no script.

The template escapes everything except the figures, which contain no text of models. A content security policy
forbids scripts and requests, whatever a sample contains.
"""

from importlib.resources import files

import jinja2

from dpo.report.content import COLUMNS, WORST_PAIRS, WORST_SAMPLES, Report
from dpo.report.escape import prompt_end, visible
from dpo.report.figures import inline_svg
from dpo.report.headline import headline_cards
from dpo.report.labels import measures


def html_page(report: Report, title: str) -> str:
    """The whole of report.html.

    Args:
        report: What was found.
        title: Of the page, such as the run folder.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown)
    template = environment.from_string((files("dpo.report") / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        report=report,
        cards=headline_cards(report.summary),
        columns=COLUMNS,
        numbers=measures(report.summary),
        prompt_end=prompt_end,
        worst_samples=WORST_SAMPLES,
        worst_pairs=WORST_PAIRS,
        figures=[
            {
                "title": captioned.title,
                "caption": captioned.caption,
                "is_wide": captioned.figure.get_figwidth() > 2 * captioned.figure.get_figheight(),
                "svg": inline_svg(captioned.figure, captioned.name),
            }
            for captioned in report.figures
        ],
    )


def _shown(value: object) -> object:
    """What the template prints, without control characters; numbers and markup stay as they are."""
    return visible(value) if type(value) is str else value
