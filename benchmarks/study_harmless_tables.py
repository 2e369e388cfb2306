"""Tables of the study on harmless dialogues, from the files of its runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from benchmarks import study_harmless
from benchmarks.study_numbers import ends, pairs_and_accuracy
from dpo.evaluate.statistics import Interval
from dpo.report.markdown import table

COMPARED = ("dpo", *study_harmless.LOSSES, "lora")
"""Runs that are compared, the first with all others."""
STUDENT_T = 2.776
"""97.5 % quantile of Student's t with 4 degrees of freedom, for 5 folds."""


def fold_accuracies(runs: Path) -> dict[str, list[float]]:
    """Run -> held-out accuracy of each fold; only runs that are finished for all folds.

    Args:
        runs: Folder of the runs on harmless dialogues.
    """
    names = [f"steps_{steps}" for steps in study_harmless.CURVE_STEPS]
    found = {}
    for name in [*names, *COMPARED]:
        folds = [
            pairs_and_accuracy(runs / f"fold_{number}" / name)
            for number in range(1, study_harmless.FOLDS + 1)
        ]
        if all(fold is not None for fold in folds):
            found[name] = [fold[1] for fold in folds if fold is not None]
    return found


def curve(runs: Path, folds: Mapping[str, Sequence[float]]) -> list[tuple[float, Interval]]:
    """(mean training pairs, mean accuracy over the folds with its interval) of each run."""
    points = []
    for name in [f"steps_{steps}" for steps in study_harmless.CURVE_STEPS] + ["dpo"]:
        if name in folds:
            each = [runs / f"fold_{n}" / name for n in range(1, study_harmless.FOLDS + 1)]
            pairs = mean(point[0] for run in each if (point := pairs_and_accuracy(run)) is not None)
            points.append((pairs, fold_interval(folds[name])))
    return points


def fold_interval(values: Sequence[float]) -> Interval:
    """Mean over 5 folds and its interval by Student's t; slightly too narrow: folds share training pairs."""
    half = STUDENT_T * stdev(values) / len(values) ** 0.5
    return Interval(mean(values), mean(values) - half, mean(values) + half)


def losses_table(folds: Mapping[str, Sequence[float]]) -> str:
    """Each loss, fold by fold, and its difference from DPO."""
    rows = []
    for name in COMPARED:
        if name not in folds:
            continue
        differences = [a - b for a, b in zip(folds[name], folds["dpo"], strict=True)]
        cells = [name, " ".join(f"{value:.3f}" for value in folds[name]), ends(fold_interval(folds[name]))]
        cells.append("" if name == "dpo" else ends(fold_interval(differences), sign="+"))
        rows.append(cells)
    return table(["run", "folds", "mean accuracy", "difference from DPO, paired"], rows)
