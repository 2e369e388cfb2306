"""Tables and figures of the studies, from the files in runs/study and runs/study_hh.

    python -m benchmarks.study_report

Writes tables.md, numbers.json and the figures to runs/study_report; without the parts that have not been run.
--name and --harmless are the names that the studies were given; then the tables are in runs/NAME_report.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import yaml
from matplotlib.figure import Figure

from benchmarks import second_judge, study_harmless, study_sentiment
from benchmarks.study_reward import RewardQuality
from dpo.commands.frontier import BEST_OF, limit_points
from dpo.evaluate.statistics import Interval
from dpo.files import read_lines
from dpo.report import labels
from dpo.report.content import COLUMNS
from dpo.report.escape import markdown_cell, prompt_end
from dpo.report.figures import PALETTE, Point, save_png, score_against_kl
from dpo.report.markdown import scored_cell, table
from dpo.tracking.history import read_history
from dpo.tracking.run_folder import RunFolder

FRONTIER = "frontier"
MAIN = Path(FRONTIER) / "beta_0.1"
SFT = "preferred-FT"
QUERIES = 12
COMPARED = ("dpo", *study_harmless.LOSSES, "lora")
"""Runs on harmless dialogues that are compared, the first with all others."""
STUDENT_T = 2.776
"""97.5 % quantile of Student's t with 4 degrees of freedom, for 5 folds."""

MAIN_COLUMNS = (
    "kl/sequence",
    "score/policy",
    "positive_share/policy",
    "win_rate",
    "distinct_2/policy",
    "perplexity/policy_samples",
    "eval/rewards/accuracies",
)
"""Metrics of the table of policies, in its order."""

Summary = dict[str, float]


def sentiment_runs(runs: Path) -> dict[str, Summary]:
    """Name in the table -> summary.json of every finished run, for its last model.

    Args:
        runs: Folder of the study's runs, here and in all functions.
    """
    found = {}
    for name, folder in policies(runs).items():
        file = RunFolder(folder).report() / "summary.json"
        if file.is_file():
            found[name] = dict(json.loads(file.read_text()))
    if (best := _best_of(runs)) is not None:
        found |= {f"best of {n}": summary for n, summary in best["best_of"].items() if n != "1"}
    return found


def policies(runs: Path) -> dict[str, Path]:
    """Name in the table -> folder of every run that there can be."""
    frontier = runs / FRONTIER
    folders = {f"DPO, beta {beta}": frontier / f"beta_{beta}" for beta in study_sentiment.BETAS.split(",")}
    folders |= {
        "DPO, beta 0.1, seed 1": runs / "seed_1",
        "DPO, beta 0.1, independent pairs": runs / "independent_pairs",
    }
    rates = {folder.name.removeprefix("sft_"): folder for folder in runs.glob("sft_*")}
    if (baseline := frontier / "preferred_sft.yaml").is_file():
        rate = float(yaml.safe_load(baseline.read_text())["train"]["learning_rate"])
        rates[f"{rate:.0e}"] = frontier / "preferred_sft"
    folders |= {f"{SFT}, rate {rate}": rates[rate] for rate in sorted(rates, key=float)}
    return folders | {"DPO on flipped labels": runs / "flipped", "DPO on shuffled labels": runs / "shuffled"}


def main_table(runs: Path) -> str:
    """One row per policy, with all metrics and their intervals."""
    rows = []
    if (best := _best_of(runs)) is not None:  # best of 1 is the reference itself
        one = best["best_of"]["1"]
        rows.append(["reference", "0", *_sampled_cells(one, win_rate="50 %"), ""])
    for name, summary in sentiment_runs(runs).items():
        kl, win_rate = with_ends(summary, "kl/sequence", 2), _share(summary, "win_rate")
        accuracy = "eval/rewards/accuracies"
        accuracy_cell = with_ends(summary, accuracy) if accuracy in summary else ""
        rows.append([name, kl, *_sampled_cells(summary, win_rate=win_rate), accuracy_cell])
    return table(["policy", *map(labels.short, MAIN_COLUMNS)], rows)


def _sampled_cells(summary: Summary, *, win_rate: str) -> list[str]:
    return [
        with_ends(summary, "score/policy"),
        _share(summary, "positive_share/policy"),
        win_rate,
        f"{summary['distinct_2/policy']:.3f}",
        f"{summary['perplexity/policy_samples']:.0f}",
    ]


def second_judge_table(runs: Path) -> str:
    """What a judge that did not make the labels says of the same samples."""
    rows = []
    for name, summary in second_judge_scores(runs).items():
        shown = [with_ends(summary, "score/policy"), _share(summary, "positive_share/policy")]
        rows.append([name, *shown, _share(summary, "win_rate") if "win_rate" in summary else ""])
    return table(["policy", "P(positive), second judge", "positive", "win rate"], rows)


def second_judge_scores(runs: Path) -> dict[str, Summary]:
    """Name in the table -> the second judge's scores, of the snapshots of a run too."""
    best = _read(RunFolder(runs / FRONTIER / "reference").best_of / second_judge.SCORES)
    found = {"reference": best.get("1", {})}
    for name, path in policies(runs).items():
        run = RunFolder(path)
        for snapshot in sorted(run.snapshots.glob("step_*")):
            step = int(snapshot.name.removeprefix("step_"))
            found[f"{name}, step {step}"] = _read(run.report(step) / second_judge.SCORES)
        found[name] = _read(run.report() / second_judge.SCORES)
    found |= {f"best of {n}, by vader": best.get(n, {}) for n in ("2", "4", "8")}
    return {name: summary for name, summary in found.items() if summary}


def dpo_curves(runs: Path) -> dict[str, list[Summary]]:
    """Beta -> summaries along its training, by ascending KL."""
    found = {}
    for beta in study_sentiment.BETAS.split(","):
        files = sorted((runs / FRONTIER / f"beta_{beta}").glob("**/report/summary.json"))
        found[beta] = sorted((json.loads(file.read_text()) for file in files), key=lambda s: s["kl/sequence"])
    return {beta: summaries for beta, summaries in found.items() if summaries}


def equal_kl_table(runs: Path) -> str:
    """Each baseline beside DPO's curves at the baseline's KL, linearly interpolated between two models.

    A curve of score over KL is concave if training is done well: the straight line does not favour DPO.
    """
    curves = dpo_curves(runs)
    rows = []
    for name, summary in sentiment_runs(runs).items():
        if not name.startswith((SFT, "best of")):
            continue
        kl = summary["kl/sequence"]
        cells = [name, f"{kl:.2f}", with_ends(summary, "score/policy")]
        cells += [score_at(points, kl) for points in curves.values()]
        rows.append(cells)
    return table(["baseline", "its KL", "its score", *(f"DPO, beta {beta}" for beta in curves)], rows)


def score_at(points: Sequence[Summary], kl: float) -> str:
    """The score of a curve at a KL, with its interval; empty beyond the curve's last KL."""
    start = {f"score/policy{end}": points[0][f"score/reference{end}"] for end in ("", "/low", "/high")}
    line = [{"kl/sequence": 0.0, **start}, *points]
    for left, right in pairwise(line):
        if left["kl/sequence"] <= kl <= right["kl/sequence"]:
            part = (kl - left["kl/sequence"]) / (right["kl/sequence"] - left["kl/sequence"])
            mixed = {name: left[name] + part * (right[name] - left[name]) for name in start}
            return with_ends(mixed, "score/policy")
    return ""


def rewards_table(runs: Path) -> str:
    """How each policy's implicit reward correlates with the score, and the gain that this predicts."""
    rows = []
    for name, values in _rewards(runs).items():
        reward = RewardQuality(*values)
        rows.append([name, f"{reward.rho:.2f}", f"{reward.predicted_gain:.3f}", f"{reward.gain:.3f}"])
    return table(["policy", "correlation with the score", "predicted gain", "gain"], rows)


def _rewards(runs: Path) -> dict[str, list[float]]:
    return _read(runs / study_sentiment.REWARDS)


def _read(file: Path) -> dict[str, Any]:
    """The JSON of a part of the study; empty if that part was not run."""
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def sentiment_figure(runs: Path) -> Figure:
    """Score against KL of all policies, with the limit of any policy."""
    curves = {
        f"DPO, beta {beta}": [Point.of(summary) for summary in points]
        for beta, points in dpo_curves(runs).items()
    }
    summaries = sentiment_runs(runs)
    by_kl = sorted(summaries.items(), key=lambda item: item[1]["kl/sequence"])
    curves[SFT] = [Point.of(s, name.split()[-1]) for name, s in by_kl if name.startswith(SFT)]
    best = _best_of(runs)
    if best is not None:
        curves[BEST_OF] = [Point.of(summary, n) for n, summary in best["best_of"].items()]
    for control in ("flipped", "shuffled"):
        curves[f"{control} labels"] = [Point.of(s) for name, s in summaries.items() if control in name]
    drawn = {name: points for name, points in curves.items() if points}
    return score_against_kl(drawn, limit=limit_points(best["limit"]) if best else ())


def books_curve(runs: Path) -> list[tuple[float, float]]:
    """(training pairs, held-out accuracy) of each run of the learning curve."""
    shorter = [runs / f"steps_{steps}" for steps in study_sentiment.CURVE_STEPS]
    return [point for run in (*shorter, runs / MAIN) if (point := _pairs_and_accuracy(run)) is not None]


def harmless_folds(runs: Path) -> dict[str, list[float]]:
    """Run -> held-out accuracy of each fold; only runs that are finished for all folds.

    Args:
        runs: Folder of the runs on harmless dialogues.
    """
    names = [f"steps_{steps}" for steps in study_harmless.CURVE_STEPS]
    found = {}
    for name in [*names, *COMPARED]:
        folds = [
            _pairs_and_accuracy(runs / f"fold_{number}" / name)
            for number in range(1, study_harmless.FOLDS + 1)
        ]
        if all(fold is not None for fold in folds):
            found[name] = [fold[1] for fold in folds if fold is not None]
    return found


def harmless_curve(runs: Path, folds: Mapping[str, Sequence[float]]) -> list[tuple[float, Interval]]:
    """(mean training pairs, mean accuracy over the folds with its interval) of each run."""
    points = []
    for name in [f"steps_{steps}" for steps in study_harmless.CURVE_STEPS] + ["dpo"]:
        if name in folds:
            each = [runs / f"fold_{n}" / name for n in range(1, study_harmless.FOLDS + 1)]
            pairs = mean(point[0] for run in each if (point := _pairs_and_accuracy(run)) is not None)
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
        cells = [name, " ".join(f"{value:.3f}" for value in folds[name]), _ends(fold_interval(folds[name]))]
        cells.append("" if name == "dpo" else _ends(fold_interval(differences), sign="+"))
        rows.append(cells)
    return table(["run", "folds", "mean accuracy", "difference from DPO, paired"], rows)


def curves_figure(books: Sequence[tuple[float, float]], harmless: Sequence[tuple[float, Interval]]) -> Figure:
    """Held-out accuracy against training pairs, for both studies."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    if books:
        axes.plot(
            *zip(*books, strict=True),
            "o-",
            color=PALETTE[0],
            label="books, preferences by vader; one run per point",
        )
    if harmless:
        pairs = [point for point, _ in harmless]
        middle = [value.mean for _, value in harmless]
        spread = [[v.mean - v.low for _, v in harmless], [v.high - v.mean for _, v in harmless]]
        label = "HH harmless; mean of 5 folds, 95 % interval"
        axes.errorbar(pairs, middle, yerr=spread, fmt="s--", color=PALETTE[1], capsize=3, label=label)
    axes.axhline(0.5, color="#8a8f98", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [100, 200, 500, 1000, 2000, 5000]
    axes.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("training pairs")
    axes.set_ylabel("held-out reward accuracy")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def trees_table(runs: Path) -> str:
    """Group trees beside independent pairs: the cost of a step, without the first one."""
    rows = []
    for name, run in {"in one step, one tree": "flipped", "independent": "independent_pairs"}.items():
        steps = [line for line in read_history(RunFolder(runs / run)) if "train/loss" in line]
        if not steps:
            continue
        rate = median(line["perf/pairs_per_second"] for line in steps[1:])
        tokens = steps[-1]["train/num_tokens"]
        seconds = median(
            (now["train/num_tokens"] - before["train/num_tokens"]) / now["perf/tokens_per_second"]
            for before, now in pairwise(steps)
        )
        rows.append([name, str(len(steps)), f"{tokens:,}", f"{seconds:.2f}", f"{rate:.1f}"])
    columns = ["pairs of a prompt", "steps", "tokens per epoch", "seconds per step, median"]
    return table([*columns, labels.short("perf/pairs_per_second")], rows)


def sentiment_table(runs: Path) -> str:
    """The first held-out queries, not cherry-picked, continued by both models with the same seed."""
    file = RunFolder(runs / MAIN).report() / "samples.jsonl"
    rows = read_lines(file)[:QUERIES] if file.is_file() else []
    cells = []
    for row in rows:
        both = [scored_cell(row[model], row[f"{model}_score"]) for model in ("reference", "policy")]
        cells.append([markdown_cell(prompt_end(row["prompt"])), *both])
    return table(COLUMNS, cells)


def main() -> None:
    """Writes everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for option, name in {"name": study_sentiment.NAME, "harmless": study_harmless.NAME}.items():
        parser.add_argument(f"--{option}", default=name, help=f"the study's name (default: {name})")
    args = parser.parse_args()
    runs, harmless_runs = Path("runs") / args.name, Path("runs") / args.harmless
    output = Path("runs") / f"{args.name}_report"
    output.mkdir(parents=True, exist_ok=True)
    folds, books = harmless_folds(harmless_runs), books_curve(runs)
    harmless = harmless_curve(harmless_runs, folds)
    columns = ("training pairs", "held-out accuracy")
    sections = {
        "Every policy": main_table(runs),
        "At equal KL": equal_kl_table(runs),
        "The second judge": second_judge_table(runs),
        "How good the implicit rewards are": rewards_table(runs),
        "Books: accuracy against training pairs": table(
            columns, [[f"{pairs:,.0f}", f"{accuracy:.3f}"] for pairs, accuracy in books]
        ),
        "Groups in one step, or independent pairs": trees_table(runs),
        "HH: accuracy against training pairs": table(
            columns, [[f"{pairs:,.0f}", _ends(accuracy)] for pairs, accuracy in harmless]
        ),
        "HH: losses": losses_table(folds),
        "The sentiment table": sentiment_table(runs),
    }
    text = "\n\n".join(f"## {title}\n\n{content}" for title, content in sections.items())
    (output / "tables.md").write_text(text + "\n")
    summaries = sentiment_runs(runs)
    numbers: dict[str, Any] = {
        "books": summaries,
        "books_curve": books,
        "harmless": folds,
        "best_of": _best_of(runs),
    }
    numbers |= {"rewards": _rewards(runs), "curves": dpo_curves(runs)}
    numbers["second_judge"] = second_judge_scores(runs)
    (output / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    save_png(curves_figure(books, harmless), output / "accuracy_against_pairs.png")
    if summaries:
        save_png(sentiment_figure(runs), output / "sentiment_frontier.png")
    print(
        f"{output}: tables.md, numbers.json, figures: {len(summaries)} policies, {len(folds)} runs in folds"
    )


def _best_of(runs: Path) -> dict[str, dict[str, Summary]] | None:
    return _read(RunFolder(runs / FRONTIER / "reference").best_of / "best_of.json") or None


def _pairs_and_accuracy(run: Path) -> tuple[float, float] | None:
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
    return _ends(Interval.of(summary, name), digits)


def _ends(value: Interval, digits: int = 3, sign: str = "") -> str:
    return f"{value.mean:{sign}.{digits}f} [{value.low:{sign}.{digits}f}, {value.high:{sign}.{digits}f}]"


def _share(summary: Summary, name: str) -> str:
    low, high = summary[f"{name}/low"], summary[f"{name}/high"]
    return f"{100 * summary[name]:.1f} [{100 * low:.1f}, {100 * high:.1f}] %"


if __name__ == "__main__":
    main()
