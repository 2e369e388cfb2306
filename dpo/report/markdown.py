"""report.md: numbers, figures, the table query | reference | policy, the worst cases, the provenance.

What models and prompts say is escaped cell by cell; see `escape`.
"""

from collections.abc import Iterable, Sequence

from dpo.report.content import (
    COLUMNS,
    PAIR_COLUMNS,
    WORST_PAIRS,
    WORST_SAMPLES,
    Captioned,
    PairRow,
    Report,
    SampleRow,
    Section,
)
from dpo.report.escape import markdown_cell, prompt_end
from dpo.report.labels import MEASURE_COLUMNS, measures
from dpo.report.reading import reading


def markdown(report: Report) -> str:
    """The whole of report.md."""
    sections = ["# What changed", _numbers(report.summary)]
    if (guide := reading(report.summary)).rows:
        sections.append(section_markdown(guide, "##"))
    if report.figures:
        sections.append("## Figures")
    sections += _figures(report.figures)
    if report.shown:
        sections += ["## Samples", report.samples_note, _sample_table(report.shown)]
    if report.worst_samples or report.worst_pairs:
        sections.append("## Where it fails")
    if report.worst_samples:
        sections += [WORST_SAMPLES, _sample_table(report.worst_samples)]
    if report.worst_pairs:
        sections += [WORST_PAIRS, _pair_table(report.worst_pairs, "margin")]
    if report.data:
        sections += ["## The data", *(section_markdown(section, "###") for section in report.data)]
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
    rows = [(markdown_cell(label), f"{value:.3f}", *rest) for label, value, *rest in measures(summary)]
    return table(MEASURE_COLUMNS, rows) if rows else ""


def section_markdown(section: Section, heading: str) -> str:
    """A section under a heading such as `##`."""
    parts = [f"{heading} {section.title}", *map(markdown_cell, section.notes)]
    if section.rows:
        columns = [column or " " for column in section.columns]
        parts.append(table(columns, ([markdown_cell(cell) for cell in row] for row in section.rows)))
    parts += _figures(section.figures)
    if section.pairs:
        parts.append(_pair_table(section.pairs, section.measure))
    return "\n\n".join(parts)


def _figures(figures: Sequence[Captioned]) -> list[str]:
    """Each figure and its caption."""
    shown = ((f"![{one.title}]({figure_file(one)})", one.caption) for one in figures)
    return [part for parts in shown for part in parts]


def _pair_table(rows: Sequence[PairRow], measure: str) -> str:
    return table(
        (*PAIR_COLUMNS, measure),
        (
            (
                markdown_cell(prompt_end(row.prompt)),
                markdown_cell(row.chosen),
                markdown_cell(row.rejected),
                row.measure,
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
