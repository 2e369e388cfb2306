"""What `dpo compare` may say of two reports: whether they measured the same, and paired differences if so.

A difference by pair or prompt is far more certain than the difference of two means: what makes a prompt hard
is the same in both runs.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpo.evaluate.statistics import Interval, mean_interval
from dpo.files import read_lines
from dpo.report import labels

SHOWN_PROMPTS = 3
"""Prompts whose continuations are shown side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reported:
    """What a report says of single pairs and prompts; empty for a run without one."""

    held_out: str = ""
    """Content of the held-out data."""
    reference: str = ""
    """Identity of the reference model."""
    sampling: str = ""
    """How the samples were drawn and scored."""
    pairs: Sequence[Mapping[str, float]] = ()
    """One for each held-out pair, in their order: prompt, correct, loss, unit."""
    samples: Sequence[Mapping[str, Any]] = ()
    """One for each prompt: prompt, reference, policy and their scores."""
    loss: Mapping[str, Any] = field(default_factory=dict)
    """The settings of the loss, since losses of different kinds are not compared."""


def read_report(folder: Path, settings: Mapping[str, Any]) -> Reported:
    """The parts of a report's folder that are there.

    Args:
        folder: RUN_DIR/report.
        settings: Dotted key -> value of the run.
    """
    made = _json_of(folder / "provenance.json")
    versions, essentials = made.get("versions", {}), made.get("essentials", {})
    return Reported(
        held_out=versions.get("held-out data", ""),
        reference=versions.get("reference cache", "").rpartition("identity ")[2],
        sampling=essentials.get("samples", ""),
        pairs=_lines_of(folder / "pairs.jsonl"),
        samples=_lines_of(folder / "samples.jsonl"),
        loss={key: value for key, value in settings.items() if key.startswith("loss.")},
    )


def differences_of_measurement(runs: Mapping[str, Reported]) -> list[str]:
    """What makes the runs' numbers those of different things, a sentence each; empty if nothing does."""
    questions = {
        "held_out": "held-out data differs, so loss, accuracy and samples are of other prompts",
        "reference": "the reference model differs, so rewards, win rate and KL are against other models",
        "sampling": "samples were drawn or scored differently, so scores, win rate and KL do not compare",
    }
    found = []
    for name, said in questions.items():
        values = {label: getattr(run, name) for label, run in runs.items() if getattr(run, name)}
        if len({*values.values()}) > 1:
            found.append(f"{said}: {'; '.join(f'{label}: {value}' for label, value in values.items())}")
    return found


def paired_differences(runs: Mapping[str, Reported]) -> list[tuple[str, list[str]]]:
    """Metric -> each run's difference from the first one, over the same pairs and prompts."""
    first, *others = runs.values()
    rows = []
    for name, values_of in (
        ("eval/loss", _losses),
        ("eval/rewards/accuracies", _correct),
        ("score/policy", _scores),
    ):
        cells = [_cell(values_of(first, other)) for other in others]
        if any(cells):
            rows.append((labels.short(name), ["", *(cell or "-" for cell in cells)]))
    return rows


def samples_side_by_side(runs: Mapping[str, Reported]) -> list[list[str]]:
    """For the first prompts that all runs continued: the prompt, and each policy's text."""
    reported = [run.samples for run in runs.values()]
    if not all(reported):
        return []
    rows = zip(*reported, strict=False)
    return [
        [str(row[0]["prompt"]), *(str(one["policy"]) for one in row)]
        for row in rows
        if len({one["prompt"] for one in row}) == 1
    ][:SHOWN_PROMPTS]


def _losses(first: Reported, other: Reported) -> Interval | None:
    """Only of the same loss, unweighted: the mean of a difference is then the difference of the means."""
    plain = all(pair["unit"] == 1 for run in (first, other) for pair in run.pairs)
    return _of_pairs(first, other, "loss") if first.loss == other.loss and plain else None


def _correct(first: Reported, other: Reported) -> Interval | None:
    return _of_pairs(first, other, "correct")


def _of_pairs(first: Reported, other: Reported, name: str) -> Interval | None:
    if not first.pairs or len(first.pairs) != len(other.pairs) or first.held_out != other.held_out:
        return None
    differences = [b[name] - a[name] for a, b in zip(first.pairs, other.pairs, strict=True)]
    return mean_interval(differences, [int(pair["prompt"]) for pair in first.pairs])


def _scores(first: Reported, other: Reported) -> Interval | None:
    """Of the policies' samples on the prompts that both continued in the same way."""
    if first.sampling != other.sampling:
        return None
    both = zip(first.samples, other.samples, strict=False)
    differences = [
        b["policy_score"] - a["policy_score"]
        for a, b in both
        if a["prompt"] == b["prompt"] and None not in (a.get("policy_score"), b.get("policy_score"))
    ]
    return mean_interval(differences, np.arange(len(differences))) if differences else None


def _cell(found: Interval | None) -> str:
    return "" if found is None else f"{found.mean:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _json_of(file: Path) -> dict[str, Any]:
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def _lines_of(file: Path) -> list[dict[str, Any]]:
    return read_lines(file) if file.is_file() else []
