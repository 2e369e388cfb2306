"""metrics.jsonl read back: one line per optimizer step and per evaluation."""

import json
from collections.abc import Sequence

from dpo.tracking.run_folder import RunFolder

Line = dict[str, float]


def complete_lines(folder: RunFolder) -> list[str]:
    """The lines of a run's file, which may end in half a line, or not exist."""
    if not folder.history.is_file():
        return []
    with folder.history.open() as file:
        return [line for line in file if line.endswith("\n")]


def read_history(folder: RunFolder) -> list[Line]:
    """Name -> number for every line, in the order in which they were written; each has `step`."""
    return [json.loads(line) for line in complete_lines(folder)]


def last_step(folder: RunFolder) -> int:
    """The last recorded optimizer step, 0 if there is none."""
    return max((int(line["step"]) for line in read_history(folder)), default=0)


def curve(history: Sequence[Line], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, without the lines that do not have it."""
    points = [(line["step"], line[name]) for line in history if name in line]
    return [step for step, _ in points], [value for _, value in points]
