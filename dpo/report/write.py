"""The files of reports: report.md, report.html and figures; summary.json, samples.jsonl, pairs.jsonl,
for_judges.jsonl, judged.jsonl and provenance.json for programs; those of `dpo data`.

Each file is replaced atomically (`dpo.files`).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from dpo.files import remove_abandoned, write_file
from dpo.report.content import Captioned, Report, Section
from dpo.report.escape import markdown_cell
from dpo.report.figures import save_png
from dpo.report.html import data_page, html_page
from dpo.report.markdown import figure_file, markdown, section_markdown


def write_report(report: Report, folder: Path, *, title: str) -> None:
    """Writes the report into `folder`, which is made if it does not exist.

    A number that is not finite is null in summary.json.

    Args:
        report: What was found.
        folder: RUN_DIR/report, or that of a snapshot.
        title: Of the page, such as the run folder.
    """
    _prepare(folder)
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in report.rows]
    write_file(folder / "samples.jsonl", "".join(line + "\n" for line in lines))
    write_file(folder / "pairs.jsonl", "".join(json.dumps(pair) + "\n" for pair in report.held_out))
    for name, found in (("for_judges.jsonl", report.for_judges), ("judged.jsonl", report.judged)):
        rows = [json.dumps(row, ensure_ascii=False) + "\n" for row in found]
        write_file(folder / name, "".join(rows)) if rows else (folder / name).unlink(missing_ok=True)
    write_file(folder / "provenance.json", json.dumps(asdict(report.provenance), indent=2) + "\n")
    _write_numbers(report.summary, folder)
    _write_figures([*report.figures, *(one for section in report.data for one in section.figures)], folder)
    write_file(folder / "report.md", markdown(report))
    write_file(folder / "report.html", html_page(report, title))


def write_data_report(
    sections: Sequence[Section],
    summary: Mapping[str, float],
    folder: Path,
    *,
    title: str,
    command: str,
    shown: int,
) -> None:
    """Writes data.md, data.html, summary.json, pairs.jsonl and the figures; the folder is made where needed.

    Args:
        sections: With all pairs that pairs.jsonl lists.
        summary: For summary.json; a number that is not finite is null there.
        folder: Where to.
        title: Of the page, such as the name of the data.
        command: That made it, as typed in a shell.
        shown: Pairs of a section that the pages show, the first ones.
    """
    short = [replace(section, pairs=section.pairs[:shown]) for section in sections]
    pairs = [{"section": section.title, **asdict(row)} for section in sections for row in section.pairs]
    lines = [json.dumps(pair, ensure_ascii=False) for pair in pairs]
    _prepare(folder)
    write_file(folder / "pairs.jsonl", "".join(line + "\n" for line in lines))
    _write_numbers(summary, folder)
    _write_figures([one for section in sections for one in section.figures], folder)
    parts = ["# The data", markdown_cell(title), *(section_markdown(section, "##") for section in short)]
    write_file(folder / "data.md", "\n\n".join([*parts, "## Command", f"    {command}"]) + "\n")
    write_file(folder / "data.html", data_page(short, title=title, command=command))


def _prepare(folder: Path) -> None:
    """Makes the folders, and removes what a killed process left in them."""
    figures = folder / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for place in (folder, figures):
        remove_abandoned(place)


def _write_numbers(summary: Mapping[str, float], folder: Path) -> None:
    finite = {key: value if math.isfinite(value) else None for key, value in summary.items()}
    write_file(folder / "summary.json", json.dumps(finite, indent=2) + "\n")


def _write_figures(figures: Sequence[Captioned], folder: Path) -> None:
    for captioned in figures:
        save_png(captioned.figure, folder / figure_file(captioned))
