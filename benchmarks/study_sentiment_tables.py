"""Tables and figure of the sentiment study, from the files in the folder of its runs."""

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

import yaml
from matplotlib.figure import Figure

from benchmarks import second_judge, study_sentiment
from benchmarks.study_numbers import Summary, pairs_and_accuracy, read, share, with_ends
from benchmarks.study_reward import RewardQuality
from dpo.commands.frontier import BEST_OF, limit_points
from dpo.files import read_lines
from dpo.report import labels
from dpo.report.content import COLUMNS
from dpo.report.escape import markdown_cell, prompt_end
from dpo.report.figures import Point, score_against_kl
from dpo.report.markdown import scored_cell, table
from dpo.tracking.history import read_history
from dpo.tracking.run_folder import RunFolder

FRONTIER = "frontier"
MAIN = Path(FRONTIER) / "beta_0.1"
SFT = "preferred-FT"
ROUNDED = {
    "bfloat16": MAIN,
    "bfloat16, not dithered": Path("undithered"),
    "float32": Path("float32"),
}
"""What of bfloat16 holds training back: name -> run of beta 0.1."""
QUERIES = 12
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


def summaries(runs: Path) -> dict[str, Summary]:
    """Name in the table -> summary.json of every finished run, for its last model."""
    found = {}
    for name, folder in policies(runs).items():
        file = RunFolder(folder).report() / "summary.json"
        if file.is_file():
            found[name] = dict(json.loads(file.read_text()))
    if (best := best_of(runs)) is not None:
        found |= {f"best of {n}": summary for n, summary in best["best_of"].items() if n != "1"}
    return found


def policies(runs: Path) -> dict[str, Path]:
    """Name in the table -> folder of every run that there can be."""
    frontier = runs / FRONTIER
    folders = {f"DPO, beta {beta}": frontier / f"beta_{beta}" for beta in study_sentiment.BETAS.split(",")}
    folders |= {
        "DPO, beta 0.1, seed 1": runs / "seed_1",
        "DPO, beta 0.1, independent pairs": runs / "independent_pairs",
        **{f"DPO, beta 0.1, {name}": runs / run for name, run in ROUNDED.items() if run != MAIN},
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
    if (best := best_of(runs)) is not None:  # best of 1 is the reference itself
        one = best["best_of"]["1"]
        rows.append(["reference", "0", *_sampled_cells(one, win_rate="50 %"), ""])
    for name, summary in summaries(runs).items():
        kl, win_rate = with_ends(summary, "kl/sequence", 2), share(summary, "win_rate")
        accuracy = "eval/rewards/accuracies"
        accuracy_cell = with_ends(summary, accuracy) if accuracy in summary else ""
        rows.append([name, kl, *_sampled_cells(summary, win_rate=win_rate), accuracy_cell])
    return table(["policy", *map(labels.short, MAIN_COLUMNS)], rows)


def _sampled_cells(summary: Summary, *, win_rate: str) -> list[str]:
    return [
        with_ends(summary, "score/policy"),
        share(summary, "positive_share/policy"),
        win_rate,
        f"{summary['distinct_2/policy']:.3f}",
        f"{summary['perplexity/policy_samples']:.0f}",
    ]


def second_judge_table(runs: Path) -> str:
    """What a judge that did not make the labels says of the same samples."""
    rows = []
    for name, summary in second_judge_scores(runs).items():
        shown = [with_ends(summary, "score/policy"), share(summary, "positive_share/policy")]
        rows.append([name, *shown, share(summary, "win_rate") if "win_rate" in summary else ""])
    return table(["policy", "P(positive), second judge", "positive", "win rate"], rows)


def second_judge_scores(runs: Path) -> dict[str, Summary]:
    """Name in the table -> the second judge's scores, of the snapshots of a run too."""
    best = read(RunFolder(runs / FRONTIER / "reference").best_of / second_judge.SCORES)
    found = {"reference": best.get("1", {})}
    for name, path in policies(runs).items():
        run = RunFolder(path)
        for snapshot in sorted(run.snapshots.glob("step_*")):
            step = int(snapshot.name.removeprefix("step_"))
            found[f"{name}, step {step}"] = read(run.report(step) / second_judge.SCORES)
        found[name] = read(run.report() / second_judge.SCORES)
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
    for name, summary in summaries(runs).items():
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
    for name, values in rewards(runs).items():
        reward = RewardQuality(*values)
        rows.append([name, f"{reward.rho:.2f}", f"{reward.predicted_gain:.3f}", f"{reward.gain:.3f}"])
    return table(["policy", "correlation with the score", "predicted gain", "gain"], rows)


def rewards(runs: Path) -> dict[str, list[float]]:
    """Policy -> how well its rewards predict the score, as `benchmarks.study_reward` measured it."""
    return read(runs / study_sentiment.REWARDS)


def frontier_figure(runs: Path) -> Figure:
    """Score against KL of all policies, with the limit of any policy."""
    curves = {
        f"DPO, beta {beta}": [Point.of(summary) for summary in points]
        for beta, points in dpo_curves(runs).items()
    }
    last = summaries(runs)
    by_kl = sorted(last.items(), key=lambda item: item[1]["kl/sequence"])
    curves[SFT] = [Point.of(s, name.split()[-1]) for name, s in by_kl if name.startswith(SFT)]
    best = best_of(runs)
    if best is not None:
        curves[BEST_OF] = [Point.of(summary, n) for n, summary in best["best_of"].items()]
    for control in ("flipped", "shuffled"):
        curves[f"{control} labels"] = [Point.of(s) for name, s in last.items() if control in name]
    drawn = {name: points for name, points in curves.items() if points}
    return score_against_kl(drawn, limit=limit_points(best["limit"]) if best else ())


def books_curve(runs: Path) -> list[tuple[float, float]]:
    """(training pairs, held-out accuracy) of each run of the learning curve."""
    shorter = [runs / f"steps_{steps}" for steps in study_sentiment.CURVE_STEPS]
    return [point for run in (*shorter, runs / MAIN) if (point := pairs_and_accuracy(run)) is not None]


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


def rounding_table(runs: Path) -> str:
    """Mean training loss of ten steps at a time, in float32 and in bfloat16 with and without dither."""
    losses = {}
    for name, run in ROUNDED.items():
        lines = read_history(RunFolder(runs / run))
        losses[name] = {int(line["step"]): line["train/loss"] for line in lines if "train/loss" in line}
    found = {name: by_step for name, by_step in losses.items() if by_step}
    last = min((max(by_step) for by_step in found.values()), default=0)
    rows = []
    for start in range(1, last - 8, 10):
        steps = range(start, start + 10)
        means = [f"{mean(by_step[step] for step in steps):.4f}" for by_step in found.values()]
        rows.append([f"{start} to {start + 9}", *means])
    return table(["steps", *found], rows)


def sentiment_table(runs: Path) -> str:
    """The first held-out queries, not cherry-picked, continued by both models with the same seed."""
    file = RunFolder(runs / MAIN).report() / "samples.jsonl"
    rows = read_lines(file)[:QUERIES] if file.is_file() else []
    cells = []
    for row in rows:
        both = [scored_cell(row[model], row[f"{model}_score"]) for model in ("reference", "policy")]
        cells.append([markdown_cell(prompt_end(row["prompt"])), *both])
    return table(COLUMNS, cells)


def best_of(runs: Path) -> dict[str, dict[str, Summary]] | None:
    """What `dpo best-of` measured; None if it was not run."""
    return read(RunFolder(runs / FRONTIER / "reference").best_of / "best_of.json") or None
