"""The report of an evaluation: numbers, figures, the table query | reference | policy, and every sample.

What models and prompts say is data: it is escaped before it enters Markdown, and control characters are taken
out before it reaches a terminal. Each file is written beside its place and renamed: nobody reads half of one.
"""

import html
import json
import math
import re
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from dpo.report.content import PairRow, Report, SampleRow
from dpo.report.figures import Captioned, save_png
from dpo.report.labels import LABELS

LONGEST_PROMPT = 400
"""Characters of a prompt that the tables show, its end; samples.jsonl has all of it."""
COLUMNS = ("query", "reference policy", "DPO-trained policy")
WORST_SAMPLES = "Picked: the samples whose score is furthest below the reference's on the same prompt."
WORST_PAIRS = "Picked: the held-out pairs that the policy's reward ranks wrong by the largest margin."


def write_report(report: Report, folder: Path) -> None:
    """Writes report.md, figures/*.png, summary.json and samples.jsonl into `folder`, which is made if it is
    missing.

    A number that is not finite is written to summary.json as null.
    """
    folder.mkdir(parents=True, exist_ok=True)
    finite = {key: value if math.isfinite(value) else None for key, value in report.summary.items()}
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in report.rows]
    write_text(folder / "summary.json", json.dumps(finite, indent=2) + "\n")
    write_text(folder / "samples.jsonl", "".join(line + "\n" for line in lines))
    (folder / "figures").mkdir(exist_ok=True)
    for captioned in report.figures:
        save_png(captioned.figure, folder / _file_of(captioned))
    write_text(folder / "report.md", markdown(report))


def markdown(report: Report) -> str:
    """The whole of report.md."""
    shown = report.rows[: report.table_rows]
    sections = ["# What changed", _numbers(report.summary)]
    if report.figures:
        sections.append("## Figures")
    for captioned in report.figures:
        sections += [f"![{captioned.title}]({_file_of(captioned)})", captioned.caption]
    if shown:
        sections += ["## Samples", samples_note(report), _sample_table(shown)]
    if report.worst_samples or report.worst_pairs:
        sections.append("## Where it fails")
    if report.worst_samples:
        sections += [WORST_SAMPLES, _sample_table(report.worst_samples)]
    if report.worst_pairs:
        sections += [WORST_PAIRS, _pair_table(report.worst_pairs)]
    essentials, provenance = (
        "\n".join(f"- {escape(key)}: {escape(value)}" for key, value in part.items())
        for part in (report.essentials, report.provenance)
    )
    commands = "\n".join("    " + " ".join(command.split()) for command in report.commands)
    sections += ["## What was compared", essentials, "## Versions and identity" if provenance else ""]
    sections += [provenance, "## Commands", commands]
    return "\n\n".join(section for section in sections if section) + "\n"


def samples_note(report: Report) -> str:
    """What a reader must know of the table of samples."""
    shown = report.rows[: report.table_rows]
    seeds = ", ".join(str(seed) for seed in sorted({row.seed for row in shown}))
    return (
        f"The first {len(shown)} held-out prompts, unpicked, each continued by both models with seed "
        f"{seeds}. All samples are in samples.jsonl."
    )


def measures(summary: dict[str, float]) -> list[tuple[str, float, str]]:
    """Label, value and interval (or nothing) of every number, in the order of the reports."""
    names = [key for key in summary if not key.endswith(("/low", "/high"))]
    names.sort(key=lambda key: list(LABELS).index(key) if key in LABELS else len(LABELS))
    found = []
    for name in names:
        low, high = summary.get(f"{name}/low"), summary.get(f"{name}/high")
        interval = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
        found.append((LABELS.get(name, name), summary[name], interval))
    return found


def terminal_table(rows: Sequence[SampleRow], width: int) -> str:
    """The table query | reference policy | DPO-trained policy for a terminal, cells wrapped.

    Args:
        rows: What to show; the caller cuts them to its number of rows.
        width: Columns of the terminal; below 60 it is taken as 60.
    """
    cell_width = (max(width, 60) - 2 * len(" | ")) // 3
    rule = "-+-".join(["-" * cell_width] * 3)
    lines = [_terminal_line(COLUMNS, cell_width), rule]
    for row in rows:
        texts = (tail(row.prompt), row.reference, row.policy)
        heads = (f"#{row.index}", _score(row.reference_score), _score(row.policy_score))
        cells = [
            [head, *_wrapped(text, cell_width)] if any(heads[1:]) else _wrapped(text, cell_width)
            for head, text in zip(heads, texts, strict=True)
        ]
        for number in range(max(map(len, cells))):
            line = [cell[number] if number < len(cell) else "" for cell in cells]
            lines.append(_terminal_line(line, cell_width))
        lines.append(rule)
    return "\n".join(lines)


def _numbers(summary: dict[str, float]) -> str:
    """The headline table: every number of the summary with its interval, where it has one."""
    lines = ["| measure | value | 95 % interval |", "|---|---|---|"]
    lines += [
        f"| {escape(label)} | {value:.3f} | {interval} |" for label, value, interval in measures(summary)
    ]
    return "\n".join(lines) if summary else ""


def _file_of(captioned: Captioned) -> str:
    return f"figures/{captioned.name}.png"


def _pair_table(rows: Sequence[PairRow]) -> str:
    lines = ["| query | chosen | rejected | margin |", "|---|---|---|---|"]
    for row in rows:
        texts = (escape(tail(row.prompt)), escape(row.chosen), escape(row.rejected))
        lines.append(f"| {' | '.join(texts)} | {row.margin:+.2f} |")
    return "\n".join(lines)


def _sample_table(rows: Sequence[SampleRow]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---|---|---|"]
    for row in rows:
        cells = (
            escape(tail(row.prompt)),
            _scored(row.reference, row.reference_score),
            _scored(row.policy, row.policy_score),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _scored(text: str, score: float | None) -> str:
    return escape(text) if score is None else f"**{_score(score)}**<br>{escape(text)}"


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:+.2f}"


def tail(prompt: str) -> str:
    """A prompt as tables show it."""
    return prompt if len(prompt) <= LONGEST_PROMPT else "…" + prompt[-LONGEST_PROMPT:]


def escape(text: str) -> str:
    r"""Text as it is, for one cell of a Markdown table: no markup of its own, in any renderer.

    HTML first, then Markdown; lines are joined by <br>. "a|b" becomes "a\|b", "<script>" "&lt;script&gt;".
    """
    lines = (html.escape(line, quote=False) for line in _lines(text))
    return "<br>".join(re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", line) for line in lines)


def visible(text: str) -> str:
    """A text with its line breaks, and a replacement character for every other control character."""
    return "\n".join(_lines(text))


def _lines(text: str) -> Iterator[str]:
    """The lines of a text without control characters: an escape code of a terminal becomes visible."""
    for line in text.splitlines():
        yield "".join(
            "\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter) in ("Cc", "Cs") else letter
            for letter in line.expandtabs(4)
        )


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in _lines(text) for part in textwrap.wrap(line, width) or [""]]


def _terminal_line(cells: Sequence[str], width: int) -> str:
    return " | ".join(cell.ljust(width) for cell in cells).rstrip()


def write_text(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
