"""Tables and figures of the studies, from the files in runs/study and runs/study_hh.

    python -m benchmarks.study_report

Writes tables.md, numbers.json and the figures to runs/study_report; without the parts that have not been run.
--name and --harmless are the names that the studies were given; then the tables are in runs/NAME_report.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks import study_harmless, study_sentiment
from benchmarks import study_harmless_tables as harmless
from benchmarks import study_sentiment_tables as sentiment
from benchmarks.study_numbers import ends
from dpo.evaluate.statistics import Interval
from dpo.report.figures import PALETTE, save_png
from dpo.report.markdown import table


def main() -> None:
    """Writes everything."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for option, name in {"name": study_sentiment.NAME, "harmless": study_harmless.NAME}.items():
        parser.add_argument(f"--{option}", default=name, help=f"the study's name (default: {name})")
    args = parser.parse_args()
    runs, of_folds = Path("runs") / args.name, Path("runs") / args.harmless
    output = Path("runs") / f"{args.name}_report"
    output.mkdir(parents=True, exist_ok=True)
    folds, books = harmless.fold_accuracies(of_folds), sentiment.books_curve(runs)
    curve = harmless.curve(of_folds, folds)
    columns = ("training pairs", "held-out accuracy")
    sections = {
        "Every policy": sentiment.main_table(runs),
        "At equal KL": sentiment.equal_kl_table(runs),
        "The second judge": sentiment.second_judge_table(runs),
        "How good the implicit rewards are": sentiment.rewards_table(runs),
        "Books: accuracy against training pairs": table(
            columns, [[f"{pairs:,.0f}", f"{accuracy:.3f}"] for pairs, accuracy in books]
        ),
        "Groups in one step, or independent pairs": sentiment.trees_table(runs),
        "The loss in bfloat16 and float32": sentiment.rounding_table(runs),
        "HH: accuracy against training pairs": table(
            columns, [[f"{pairs:,.0f}", ends(accuracy)] for pairs, accuracy in curve]
        ),
        "HH: losses": harmless.losses_table(folds),
        "The sentiment table": sentiment.sentiment_table(runs),
    }
    text = "\n\n".join(f"## {title}\n\n{content}" for title, content in sections.items())
    (output / "tables.md").write_text(text + "\n")
    summaries = sentiment.summaries(runs)
    numbers = {
        "books": summaries,
        "books_curve": books,
        "harmless": folds,
        "best_of": sentiment.best_of(runs),
        "rewards": sentiment.rewards(runs),
        "curves": sentiment.dpo_curves(runs),
        "second_judge": sentiment.second_judge_scores(runs),
    }
    (output / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
    save_png(curves_figure(books, curve), output / "accuracy_against_pairs.png")
    if summaries:
        save_png(sentiment.frontier_figure(runs), output / "sentiment_frontier.png")
    print(
        f"{output}: tables.md, numbers.json, figures: {len(summaries)} policies, {len(folds)} runs in folds"
    )


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


if __name__ == "__main__":
    main()
