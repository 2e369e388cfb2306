"""metrics.jsonl read back: a line per optimizer step and per evaluation."""

import json
from collections.abc import Sequence
from pathlib import Path

HISTORY_FILE = "metrics.jsonl"

Line = dict[str, float]


def complete_lines(run_dir: Path) -> list[str]:
    """The lines of a run's file, which may end in a half one, or not exist."""
    path = run_dir / HISTORY_FILE
    if not path.is_file():
        return []
    with path.open() as file:
        return [line for line in file if line.endswith("\n")]


def read_history(run_dir: Path) -> list[Line]:
    """Name -> number of every line, in the order in which they were written; each has `step`."""
    return [json.loads(line) for line in complete_lines(run_dir)]


def curve(history: Sequence[Line], name: str) -> tuple[list[float], list[float]]:
    """Steps and values of one metric, without the lines that do not have it."""
    points = [(line["step"], line[name]) for line in history if name in line]
    return [step for step, _ in points], [value for _, value in points]
