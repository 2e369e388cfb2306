"""The table of samples for a terminal: three equal columns with wrapped cells, no control characters."""

import textwrap
from collections.abc import Sequence

from dpo.report.content import COLUMNS, SampleRow
from dpo.report.escape import prompt_end, visible_lines


def terminal_table(rows: Sequence[SampleRow], width: int) -> str:
    """The table, without control characters.

    Args:
        rows: What to show.
        width: Columns of the terminal; at least 60 are used.
    """
    cell_width = (max(width, 60) - 2 * len(" | ")) // 3
    rule = "-+-".join(["-" * cell_width] * 3)
    lines = [_line(COLUMNS, cell_width), rule]
    for row in rows:
        texts = (prompt_end(row.prompt), row.reference, row.policy)
        heads = (f"#{row.index}", _score(row.reference_score), _score(row.policy_score))
        has_scores = any(heads[1:])
        cells = [
            [head, *_wrapped(text, cell_width)] if has_scores else _wrapped(text, cell_width)
            for head, text in zip(heads, texts, strict=True)
        ]
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
