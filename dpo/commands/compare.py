"""dpo compare: runs side by side, in what they were told, what they reached, and how they got there."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dpo import terminal
from dpo.config import flat
from dpo.errors import UserError
from dpo.evaluate.statistics import Interval
from dpo.report.figures import Point, losses_and_margins, save_png, score_against_kl
from dpo.tracking.history import Line, read_history
from dpo.tracking.run_folder import RunFolder

MEASURES = {
    "eval/loss": "held-out loss",
    "eval/rewards/accuracies": "held-out reward accuracy",
    "eval/rewards/margins": "held-out reward margin",
    "score/policy": "mean score",
    "positive_share/policy": "share scored positive",
    "win_rate": "win rate over the reference",
    "kl/sequence": "KL, nats a sequence",
    "distinct_2/policy": "distinct word pairs",
    "repetition/policy": "repeated word pairs",
    "perplexity/policy_samples": "perplexity under the reference",
}
SPEED = {
    "perf/pairs_per_second": "pairs a second",
    "perf/sequences_per_second": "sequences a second",
    "perf/tokens_per_second": "tokens a second",
    "perf/peak_memory_gb": "peak memory, GB",
}
NOT_SHOWN = ("run_dir", "train.resume", "train.resume_allow")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """What a run folder says."""

    label: str
    """Its name, or its path where two have the same name."""
    settings: dict[str, Any]
    """Dotted key -> value."""
    history: Sequence[Line]
    summary: dict[str, float]
    """Of its report, or without one of its last evaluation in training."""


Rows = list[tuple[str, list[str]]]


def compare_runs(folders: Sequence[Path], output: Path) -> None:
    """Prints the table, and writes comparison.md, comparison.json and the figures.

    Args:
        folders: Run folders, at least two.
        output: Where to write; made if it is missing.

    Raises:
        UserError: One is not a run, or there is nothing to compare.
    """
    runs = read_runs(folders)
    sections = {
        "what differs": differing_settings(runs),
        "what was reached": reached(runs),
        "how fast": speeds(runs),
    }
    output.mkdir(parents=True, exist_ok=True)
    figures = {"curves": losses_and_margins({run.label: run.history for run in runs})}
    if points := points_of(runs):
        figures["score_kl"] = score_against_kl(points, "mean score", joined=False)
    for name, figure in figures.items():
        save_png(figure, output / f"{name}.png")
    (output / "comparison.md").write_text(markdown(runs, sections, list(figures)))
    numbers = {run.label: {"settings": run.settings, "summary": run.summary} for run in runs}
    (output / "comparison.json").write_text(json.dumps(numbers, indent=2))
    width = shutil.get_terminal_size((120, 24)).columns
    print(table(runs, sections, width))
    terminal.summary("compare", {"written": f"{output / 'comparison.md'}\nfigures and numbers are beside it"})


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """All of them, or a UserError that names every one that is not a run."""
    problems = [
        f"{folder}: {'no config.yaml in it' if folder.is_dir() else 'no such folder'}; expected a run_dir"
        for folder in folders
        if not (folder / "config.yaml").is_file()
    ]
    if len(folders) < 2:
        problems.append("expected at least two run folders: dpo compare RUN_A RUN_B ...")
    if problems:
        raise UserError("\n".join(problems))
    names = [folder.resolve().name for folder in folders]
    labels = [
        name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)
    ]
    return [_read(folder, label) for folder, label in zip(folders, labels, strict=True)]


def _read(folder: Path, label: str) -> FinishedRun:
    history = read_history(RunFolder(folder))
    summary: dict[str, float] = {}
    for line in history:
        summary |= {name: value for name, value in line.items() if name.startswith("eval/")}
    report = folder / "report" / "summary.json"
    if report.is_file():
        found = json.loads(report.read_text())
        summary |= {name: value for name, value in found.items() if value is not None}
    settings = flat(yaml.safe_load((folder / "config.yaml").read_text()))
    return FinishedRun(label=label, settings=settings, history=history, summary=summary)


def differing_settings(runs: Sequence[FinishedRun]) -> Rows:
    """Keys whose values are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in NOT_SHOWN)
    rows = [(key, [str(run.settings.get(key, "-")) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def reached(runs: Sequence[FinishedRun]) -> Rows:
    """Numbers with their intervals, where at least one run has them."""
    steps = [str(int(max((line["step"] for line in run.history), default=0))) for run in runs]
    rows = [("steps", steps)]
    for name, label in MEASURES.items():
        if any(name in run.summary for run in runs):
            rows.append((label, [_number(run.summary, name) for run in runs]))
    return rows


def speeds(runs: Sequence[FinishedRun]) -> Rows:
    """Medians over the steps, which a slow first step does not move."""
    rows: Rows = []
    for name, label in SPEED.items():
        values = [sorted(line[name] for line in run.history if name in line) for run in runs]
        if any(values):
            rows.append((label, [f"{of[len(of) // 2]:,.4g}" if of else "-" for of in values]))
    return rows


def points_of(runs: Sequence[FinishedRun]) -> dict[str, list[Point]]:
    """Label -> the run between score and KL, for those that were evaluated with a scorer."""
    found = {}
    for run in runs:
        if {"kl/sequence/low", "score/policy/low"} <= run.summary.keys():
            kl, score = (
                Interval(run.summary[name], run.summary[f"{name}/low"], run.summary[f"{name}/high"])
                for name in ("kl/sequence", "score/policy")
            )
            found[run.label] = [Point(label=run.label, kl=kl, score=score)]
    return found


def table(runs: Sequence[FinishedRun], sections: dict[str, Rows], width: int) -> str:
    """For a terminal: a column a run. Cells are cut where they do not fit."""
    labels = [label for rows in sections.values() for label, _ in rows]
    first = max(map(len, [*labels, *sections]), default=0)
    widest = max(len(value) for rows in sections.values() for _, values in rows for value in values)
    widest = max(widest, *(len(run.label) for run in runs))
    room = max(12, min(widest, (width - first) // len(runs) - 2))

    def line(head: str, cells: Sequence[str]) -> str:
        cut = [cell if len(cell) <= room else "…" + cell[1 - room :] for cell in cells]
        return "  ".join([head.ljust(first), *(cell.ljust(room) for cell in cut)]).rstrip()

    lines = [line("", [run.label for run in runs])]
    for title, rows in sections.items():
        if rows:
            lines += ["", f"{title}", *(line(label, values) for label, values in rows)]
    return "\n".join(lines)


def markdown(runs: Sequence[FinishedRun], sections: dict[str, Rows], figures: Sequence[str]) -> str:
    """The same for comparison.md."""
    head = [
        "| | " + " | ".join(_cell(run.label) for run in runs) + " |",
        "|---" * (len(runs) + 1) + "|",
    ]
    parts = ["# Runs side by side"]
    for title, rows in sections.items():
        if rows:
            lines = [f"| {_cell(label)} | " + " | ".join(map(_cell, values)) + " |" for label, values in rows]
            parts += [f"## {title.capitalize()}", "\n".join([*head, *lines])]
    parts += [f"![{name}]({name}.png)" for name in figures]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _number(summary: dict[str, float], name: str) -> str:
    if name not in summary:
        return "-"
    low, high = summary.get(f"{name}/low"), summary.get(f"{name}/high")
    return f"{summary[name]:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")
