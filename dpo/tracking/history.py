"""metrics.jsonl read back: one line per optimizer step and per evaluation. The one reader of that file.

A crash may leave half a line or zeros at the end, which are left out; damage before a line that is needed is
an error.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from dpo.errors import UserError
from dpo.tracking.run_folder import RunFolder

Line = dict[str, float]


@dataclass(frozen=True, slots=True)
class History:
    """What a file holds."""

    lines: list[Line] = field(default_factory=list)
    """Name -> number for every line, in the order in which they were written; each has `step`."""
    texts: list[str] = field(default_factory=list)
    """The same as they were written."""
    num_damaged: int = 0
    """Damaged lines that were left out, besides one that was cut short by the end of a process."""


def load_history(folder: RunFolder, *, until: float = math.inf) -> History:
    """The lines of a run's file up to a step; the file may end in damage, or not exist.

    Args:
        folder: The run folder.
        until: Lines after the last one of this step are left out, damaged or not.

    Raises:
        UserError: A line before those is damaged, or the file cannot be read.
    """
    parts, rest = _parts(folder)
    parsed = [_parsed(part) for part in parts]
    wanted = (index for index, line in enumerate(parsed, 1) if line is not None and line["step"] <= until)
    end = max(wanted, default=0)
    lines = [line for line in parsed[:end] if line is not None]
    if len(lines) < end:
        raise UserError(
            f"{folder.history}: line {parsed.index(None) + 1} is damaged, and lines after it are needed; "
            "expected an object of numbers with step: put the file back, or delete that line"
        )
    texts = [f"{part.decode()}\n" for part in parts[:end]]
    return History(lines, texts, parsed[end:].count(None) + (b"\0" in rest))


def read_history(folder: RunFolder) -> list[Line]:
    """Name -> number for every line, in the order in which they were written; each has `step`.

    Raises:
        UserError: See `load_history`.
    """
    return load_history(folder).lines


def last_step(folder: RunFolder) -> int:
    """The last recorded optimizer step, 0 if there is none; damaged lines are passed over.

    Raises:
        UserError: The file cannot be read.
    """
    lines = map(_parsed, _parts(folder)[0])
    return max((int(line["step"]) for line in lines if line is not None), default=0)


def curve(history: Sequence[Line], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, without the lines that do not have it."""
    points = [(line["step"], line[name]) for line in history if name in line]
    return [step for step, _ in points], [value for _, value in points]


def _parts(folder: RunFolder) -> tuple[list[bytes], bytes]:
    """The complete lines, and what follows the last line end."""
    try:
        *parts, rest = folder.history.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], b""
    except OSError as error:
        raise UserError(f"{folder.history}: cannot be read ({error.strerror})") from error
    return parts, rest


def _parsed(text: bytes) -> Line | None:
    """A line's numbers, or None for a damaged one."""
    try:
        line = json.loads(text)
        return line if isinstance(line, dict) and isinstance(line.get("step"), int) else None
    except ValueError:  # neither JSON nor UTF-8
        return None
