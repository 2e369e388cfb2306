"""dpo compare: runs side by side: settings that differ, results, speed, and the curves of training.

Reads only run folders. Prints a table, and writes it with figures and numbers.
"""

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from dpo import terminal
from dpo.commands.paired import (
    Reported,
    differences_of_measurement,
    paired_differences,
    read_report,
    samples_side_by_side,
)
from dpo.config import flat
from dpo.errors import UserError
from dpo.files import write_file
from dpo.report import labels
from dpo.report.escape import markdown_cell, prompt_end
from dpo.report.figures import Point, losses_and_margins, save_png, score_against_kl
from dpo.report.markdown import table as markdown_table
from dpo.report.terminal_table import side_by_side
from dpo.tracking.history import Line, read_history
from dpo.tracking.run_folder import RunFolder

RESULTS = (
    "eval/loss",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
    "score/policy",
    "positive_share/policy",
    "win_rate",
    "kl/sequence",
    "distinct_2/policy",
    "repetition/policy",
    "perplexity/policy_samples",
)
"""Metrics of the table, in its order."""
SPEED = (
    "perf/pairs_per_second",
    "perf/sequences_per_second",
    "perf/tokens_per_second",
    "perf/peak_memory_gb",
)
NOT_SHOWN = ("run_dir", "train.resume", "train.resume_allow")
"""Settings that always differ, or do not matter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """The content of a run folder."""

    label: str
    """Its name, or its path if two runs have the same name."""
    settings: dict[str, Any]
    """Dotted key -> value."""
    history: Sequence[Line]
    summary: dict[str, float]
    """Of its report; what the report lacks is from the last evaluation of training."""
    reported: Reported
    """What its report says of single pairs and prompts."""


Rows = list[tuple[str, list[str]]]
"""Label -> one cell per run."""


def compare_runs(folders: Sequence[Path], output: Path) -> None:
    """Prints the table, and writes comparison.md, comparison.json and the figures.

    Args:
        folders: Run folders, at least two.
        output: Where to write; made if it does not exist.

    Raises:
        UserError: A folder is not a run, or there are fewer than two.
    """
    runs = read_runs(folders)
    reported = {run.label: run.reported for run in runs}
    differ = differences_of_measurement(reported)
    sections = {
        "settings that differ": differing_settings(runs),
        "results": results(runs),
        f"differences from {runs[0].label}, by pair and prompt": paired_differences(reported),
        "speed": speeds(runs),
    }
    output.mkdir(parents=True, exist_ok=True)
    figures = {"curves": losses_and_margins({run.label: run.history for run in runs})}
    if points := points_of(runs):
        figures["score_kl"] = score_against_kl(points, joined=False)
    for name, figure in figures.items():
        save_png(figure, output / f"{name}.png")
    samples = samples_side_by_side(reported)
    write_file(output / "comparison.md", markdown(runs, sections, list(figures), differ, samples))
    numbers = {run.label: {"settings": run.settings, "summary": run.summary} for run in runs}
    write_file(output / "comparison.json", json.dumps(numbers, indent=2))
    width = shutil.get_terminal_size((80, 24)).columns
    terminal.warning(*differ)
    shown = [table(runs, sections, width)]
    if samples:
        columns = ("query", *(run.label for run in runs))
        shown += ["", side_by_side(columns, [(None, row) for row in samples], width)]
    terminal.answer("comparison", "\n".join(shown), {"runs": numbers, "differ": differ})
    terminal.summary("compare", {"written": f"{output / 'comparison.md'}\nfigures and numbers are beside it"})


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """All runs, or a UserError that names every folder that is not one."""
    problems = [
        f"{folder}: {'no config.yaml in it' if folder.is_dir() else 'no such folder'}; expected a run_dir"
        for folder in folders
        if not RunFolder(folder).config.is_file()
    ]
    if len(folders) < 2:
        problems.append("expected at least two run folders: dpo compare RUN_A RUN_B ...")
    if problems:
        raise UserError("\n".join(problems))
    names = [folder.resolve().name for folder in folders]
    labels = [
        name if names.count(name) == 1 else str(folder) for name, folder in zip(names, folders, strict=True)
    ]
    return [_read(RunFolder(folder), label) for folder, label in zip(folders, labels, strict=True)]


def _read(folder: RunFolder, label: str) -> FinishedRun:
    history = read_history(folder)
    summary: dict[str, float] = {}
    for line in history:
        summary |= {name: value for name, value in line.items() if name.startswith("eval/")}
    report = folder.report() / "summary.json"
    if report.is_file():
        found = json.loads(report.read_text())
        summary |= {name: value for name, value in found.items() if value is not None}
    settings = flat(folder.settings())
    return FinishedRun(
        label=label,
        settings=settings,
        history=history,
        summary=summary,
        reported=read_report(folder.report(), settings),
    )


def differing_settings(runs: Sequence[FinishedRun]) -> Rows:
    """Keys whose values differ between the runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in NOT_SHOWN)
    rows = [(key, [str(run.settings.get(key, "-")) for run in runs]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def results(runs: Sequence[FinishedRun]) -> Rows:
    """Steps, and metrics with their intervals; without those that no run has."""
    steps = [str(int(max((line["step"] for line in run.history), default=0))) for run in runs]
    rows = [("steps", steps)]
    for name in RESULTS:
        if any(name in run.summary for run in runs):
            rows.append((labels.short(name), [_number(run.summary, name) for run in runs]))
    return rows


def speeds(runs: Sequence[FinishedRun]) -> Rows:
    """Medians over the steps, which a slow first step does not change."""
    rows: Rows = []
    for name in SPEED:
        values = [sorted(line[name] for line in run.history if name in line) for run in runs]
        if any(values):
            rows.append((labels.short(name), [f"{of[len(of) // 2]:,.4g}" if of else "-" for of in values]))
    return rows


def points_of(runs: Sequence[FinishedRun]) -> dict[str, list[Point]]:
    """Label -> KL and score of the run, for those that were evaluated with a scorer."""
    return {
        run.label: [Point.of(run.summary, label=run.label)]
        for run in runs
        if {"kl/sequence/low", "score/policy/low"} <= run.summary.keys()
    }


def table(runs: Sequence[FinishedRun], sections: dict[str, Rows], width: int) -> str:
    """For a terminal: one column per run. Cells that do not fit are wrapped."""
    labelled = [("", [run.label for run in runs]), *chain.from_iterable(sections.values())]
    first = max(len(label) for label, _ in labelled)
    widest = max(len(value) for _, values in labelled for value in values)
    room = max(12, min(widest, (width - first) // len(runs) - 2))

    def lines_of(row: tuple[str, list[str]]) -> Iterator[str]:
        cells = [_wrapped(text, room) for text in row[1]]
        for parts in zip_longest([row[0]], *cells, fillvalue=""):
            head, *others = parts
            yield "  ".join([head.ljust(first), *(part.ljust(room) for part in others)]).rstrip()

    lines = [*lines_of(labelled[0])]
    for title, rows in sections.items():
        if rows:
            lines += ["", title, *chain.from_iterable(map(lines_of, rows))]
    return "\n".join(lines)


def _wrapped(text: str, room: int) -> list[str]:
    """Lines of a cell; an interval is not broken if it fits into one."""
    whole = text.replace(", ", ",\N{NO-BREAK SPACE}")
    fits = all(len(word) <= room for word in whole.split(" "))
    lines = textwrap.wrap(whole if fits else text, room, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def markdown(
    runs: Sequence[FinishedRun],
    sections: dict[str, Rows],
    figures: Sequence[str],
    differ: Sequence[str] = (),
    samples: Sequence[Sequence[str]] = (),
) -> str:
    """comparison.md: what does not compare, the same sections, samples side by side, then the figures."""
    head = [
        "| | " + " | ".join(_cell(run.label) for run in runs) + " |",
        "|---" * (len(runs) + 1) + "|",
    ]
    parts = ["# Runs side by side", *(f"**{markdown_cell(said)}**" for said in differ)]
    for title, rows in sections.items():
        if rows:
            lines = [f"| {_cell(label)} | " + " | ".join(map(_cell, values)) + " |" for label, values in rows]
            parts += [f"## {title.capitalize()}", "\n".join([*head, *lines])]
    if samples:
        columns = ["query", *(_cell(run.label) for run in runs)]
        cells = ([markdown_cell(prompt_end(row[0])), *map(markdown_cell, row[1:])] for row in samples)
        parts += ["## Samples", markdown_table(columns, cells)]
    parts += [f"![{name}]({name}.png)" for name in figures]
    return "\n\n".join(parts) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _number(summary: dict[str, float], name: str) -> str:
    if name not in summary:
        return "-"
    low, high = summary.get(f"{name}/low"), summary.get(f"{name}/high")
    return f"{summary[name]:.3f}" + ("" if low is None or high is None else f" [{low:.3f}, {high:.3f}]")
