"""report.md: numbers, figures, the table query | reference | policy, the worst cases, the provenance.

What models and prompts say is escaped cell by cell; see `escape`.
"""

from collections.abc import Iterable, Sequence

from dpo.report.content import COLUMNS, WORST_PAIRS, WORST_SAMPLES, PairRow, Report, SampleRow
from dpo.report.escape import markdown_cell, prompt_end
from dpo.report.figures import Captioned
from dpo.report.labels import measures


def markdown(report: Report) -> str:
    """The whole of report.md."""
    sections = ["# What changed", _numbers(report.summary)]
    if report.figures:
        sections.append("## Figures")
    for captioned in report.figures:
        sections += [f"![{captioned.title}]({figure_file(captioned)})", captioned.caption]
    if report.shown:
        sections += ["## Samples", report.samples_note, _sample_table(report.shown)]
    if report.worst_samples or report.worst_pairs:
        sections.append("## Where it fails")
    if report.worst_samples:
        sections += [WORST_SAMPLES, _sample_table(report.worst_samples)]
    if report.worst_pairs:
        sections += [WORST_PAIRS, _pair_table(report.worst_pairs)]
    provenance = report.provenance
    sections += ["## What was compared", _items(provenance.essentials)]
    if provenance.versions:
        sections += ["## Versions and identity", _items(provenance.versions)]
    commands = "\n".join("    " + " ".join(command.split()) for command in provenance.commands)
    sections += ["## Commands", commands]
    return "\n\n".join(section for section in sections if section) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; cells must be escaped already."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in (columns, *rows))
    return "\n".join([head, "|" + "---|" * len(columns), *body])


def scored_cell(text: str, score: float | None) -> str:
    """A sample as a cell, its score above it."""
    return markdown_cell(text) if score is None else f"**{score:+.2f}**<br>{markdown_cell(text)}"


def figure_file(captioned: Captioned) -> str:
    """Path of a figure within the report's folder."""
    return f"figures/{captioned.name}.png"


def _numbers(summary: dict[str, float]) -> str:
    rows = [(markdown_cell(label), f"{value:.3f}", interval) for label, value, interval in measures(summary)]
    return table(("measure", "value", "95 % interval"), rows) if rows else ""


def _pair_table(rows: Sequence[PairRow]) -> str:
    return table(
        ("query", "chosen", "rejected", "margin"),
        (
            (
                markdown_cell(prompt_end(row.prompt)),
                markdown_cell(row.chosen),
                markdown_cell(row.rejected),
                f"{row.margin:+.2f}",
            )
            for row in rows
        ),
    )


def _sample_table(rows: Sequence[SampleRow]) -> str:
    return table(
        COLUMNS,
        (
            (
                markdown_cell(prompt_end(row.prompt)),
                scored_cell(row.reference, row.reference_score),
                scored_cell(row.policy, row.policy_score),
            )
            for row in rows
        ),
    )


def _items(values: dict[str, str]) -> str:
    return "\n".join(f"- {markdown_cell(key)}: {markdown_cell(value)}" for key, value in values.items())
