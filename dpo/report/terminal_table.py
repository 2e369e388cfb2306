"""Tables for a terminal: texts in equal columns with wrapped cells, without control characters."""

import textwrap
from collections.abc import Sequence

from dpo.report.content import COLUMNS, PAIR_COLUMNS, SampleRow, Section
from dpo.report.escape import prompt_end, visible_lines


def terminal_table(rows: Sequence[SampleRow], width: int) -> str:
    """The table, without control characters.

    Args:
        rows: What to show.
        width: Columns of the terminal; at least 60 are used.
    """
    shown = []
    for row in rows:
        texts = (prompt_end(row.prompt), row.reference, row.policy)
        heads = (f"#{row.index}", _score(row.reference_score), _score(row.policy_score))
        shown.append((heads if any(heads[1:]) else None, texts))
    return side_by_side(COLUMNS, shown, width)


def section_text(section: Section, width: int, *, pairs: int) -> str:
    """A section for a terminal, without its figures.

    Args:
        section: What to show.
        width: Columns of the terminal; at least 60 are used.
        pairs: Most of its pairs that are shown.
    """
    width = max(width, 60)
    parts = [section.title, *("\n".join(_wrapped(note, width)) for note in section.notes)]
    if section.rows:
        parts.append(_aligned([section.columns, *section.rows], width))
    if shown := section.pairs[:pairs]:
        rows = [
            ((f"{section.measure} {row.measure}", "", ""), (prompt_end(row.prompt), row.chosen, row.rejected))
            for row in shown
        ]
        parts.append(side_by_side(PAIR_COLUMNS, rows, width))
    return "\n".join(parts)


def _aligned(rows: Sequence[Sequence[str]], width: int) -> str:
    """A table of labels and short cells; a label that does not fit is cut."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    widths[0] = min(widths[0], width - sum(widths[1:]) - 2 * len(widths))
    return "\n".join(
        "  " + "  ".join(cell[:room].ljust(room) for cell, room in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def side_by_side(
    columns: Sequence[str], rows: Sequence[tuple[Sequence[str] | None, Sequence[str]]], width: int
) -> str:
    """Texts in N equal columns.

    Args:
        columns: N headings.
        rows: Of each row N short heads, or None, and N texts.
        width: Columns of the terminal; at least 60 are used.
    """
    cell_width = (max(width, 60) - (len(columns) - 1) * len(" | ")) // len(columns)
    rule = "-+-".join(["-" * cell_width] * len(columns))
    lines = [_line(columns, cell_width), rule]
    for heads, texts in rows:
        cells = [_wrapped(text, cell_width) for text in texts]
        if heads is not None:
            cells = [[head, *cell] for head, cell in zip(heads, cells, strict=True)]
        for number in range(max(map(len, cells))):
            lines.append(_line([cell[number] if number < len(cell) else "" for cell in cells], cell_width))
        lines.append(rule)
    return "\n".join(lines)


def _wrapped(text: str, width: int) -> list[str]:
    return [part for line in visible_lines(text) for part in textwrap.wrap(line, width) or [""]]


def _line(cells: Sequence[str], width: int) -> str:
    return " | ".join(cell.ljust(width) for cell in cells).rstrip()


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:+.2f}"
