"""What the tables of the studies read from finished runs, and how they write a number with its interval."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from dpo.evaluate.statistics import Interval
from dpo.tracking.history import read_history
from dpo.tracking.run_folder import RunFolder

Summary = dict[str, float]


def read(file: Path) -> dict[str, Any]:
    """The JSON of a part of the study; empty if that part was not run."""
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def pairs_and_accuracy(run: Path) -> tuple[float, float] | None:
    """Training pairs of a finished run, and its last held-out accuracy; None if it is not finished."""
    if not (RunFolder(run).model() / "README.md").is_file():
        return None
    history = read_history(RunFolder(run))
    steps = [line for line in history if "train/loss" in line]
    totals = [0.0, *(line["train/num_tokens"] for line in steps)]
    pairs = sum(  # of a step: pairs per token, times its tokens
        line["perf/pairs_per_second"] / line["perf/tokens_per_second"] * (now - before)
        for line, (before, now) in zip(steps, pairwise(totals), strict=True)
    )
    return round(pairs), history[-1]["eval/rewards/accuracies"]


def with_ends(summary: Summary, name: str, digits: int = 3) -> str:
    """A value of a summary with its interval."""
    return ends(Interval.of(summary, name), digits)


def ends(value: Interval, digits: int = 3, sign: str = "") -> str:
    """A value with its interval."""
    return f"{value.mean:{sign}.{digits}f} [{value.low:{sign}.{digits}f}, {value.high:{sign}.{digits}f}]"


def share(summary: Summary, name: str) -> str:
    """A share of a summary in percent, with its interval."""
    low, high = summary[f"{name}/low"], summary[f"{name}/high"]
    return f"{100 * summary[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}] %"
