"""report.html: the report as one file that needs no network and runs no script.

Everything in it is escaped by the template, but the figures, which hold no text of models; a content security
policy forbids scripts and requests whatever a sample may say.
"""

from importlib.resources import files
from typing import NamedTuple

import jinja2

from dpo.report.content import Report
from dpo.report.figures import inline_svg
from dpo.report.markdown import COLUMNS, WORST_PAIRS, WORST_SAMPLES, measures, samples_note, tail, visible


class Card(NamedTuple):
    """One of the questions that a person has first."""

    question: str
    answer: str
    detail: str


def html_page(report: Report, title: str) -> str:
    """The whole of report.html.

    Args:
        report: What was found.
        title: Of the page, such as the run's folder.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, finalize=_shown)
    template = environment.from_string((files("dpo.report") / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=title,
        report=report,
        cards=headline_cards(report.summary),
        columns=COLUMNS,
        shown=report.rows[: report.table_rows],
        note=samples_note(report),
        numbers=measures(report.summary),
        tail=tail,
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


def headline_cards(summary: dict[str, float]) -> list[Card]:
    """Did it learn the preference, what did it cost, does the text still read well: as far as is known."""
    cards = []
    if "eval/rewards/accuracies" in summary:
        low, high = summary["eval/rewards/accuracies/low"], summary["eval/rewards/accuracies/high"]
        cards.append(
            Card(
                "Did it learn the preference?",
                f"{summary['eval/rewards/accuracies']:.1%}",
                f"of held-out pairs ranked right, {low:.1%} to {high:.1%}",
            )
        )
    if "positive_share/policy" in summary:
        cards.append(
            Card(
                "Do the samples show it?",
                f"{summary['positive_share/reference']:.0%} → {summary['positive_share/policy']:.0%}",
                f"scored positive; {summary['win_rate']:.0%} beat the reference's",
            )
        )
    if "kl/sequence" in summary:
        low, high = summary["kl/sequence/low"], summary["kl/sequence/high"]
        cards.append(
            Card(
                "What did it cost?",
                f"{summary['kl/sequence']:.2f} nats",
                f"of KL from the reference a sequence, {low:.2f} to {high:.2f}",
            )
        )
        cards.append(
            Card(
                "Does the text still read well?",
                f"{summary['distinct_2/reference']:.2f} → {summary['distinct_2/policy']:.2f}",
                f"distinct word pairs; perplexity under the reference "
                f"{summary['perplexity/policy_samples']:.1f}",
            )
        )
    return cards


def _shown(value: object) -> object:
    """What the template prints, without control characters; a number or markup stays as it is."""
    return visible(value) if type(value) is str else value
