"""Rounds on excerpts of novels against offline runs of as many pairs; docs/results.md has the command.

Reads what `dpo rounds` wrote, and the offline runs' numbers and the limit from docs/study.json.
"""

import argparse
import json
from pathlib import Path

from benchmarks.study_report import Summary, score_at, with_ends
from dpo.commands.frontier import limit_points
from dpo.report.figures import Point, save_png, score_against_kl
from dpo.report.markdown import table

OFFLINE = "DPO, beta {}"
BETAS = ("1", "0.3", "0.1", "0.05")
"""Of the offline runs, by ascending KL."""


def rounds_table(rounds: list[Summary], offline: list[Summary]) -> str:
    """Each round beside the score of the offline runs at its KL, interpolated between their last steps."""
    head = ["round", "KL, nats", "mean score", "offline at that KL", "positive", "win rate", "accuracy"]
    names = ("positive_share/policy", "win_rate", "eval/rewards/accuracies")
    rows = [
        [
            str(number),
            with_ends(summary, "kl/sequence"),
            with_ends(summary, "score/policy"),
            score_at(offline, summary["kl/sequence"]),
            *(with_ends(summary, name) for name in names),
        ]
        for number, summary in enumerate(rounds, 1)
    ]
    return table(head, rows)


def main() -> None:
    """Prints the table and draws the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=Path, required=True, help="rounds.json")
    parser.add_argument("--study", type=Path, default=Path("docs/study.json"))
    parser.add_argument("--figure", type=Path, required=True)
    args = parser.parse_args()
    rounds: list[Summary] = json.loads(args.rounds.read_text())
    study = json.loads(args.study.read_text())
    offline = [study["books"][OFFLINE.format(beta)] for beta in BETAS]
    print(rounds_table(rounds, offline))
    curves = {
        "reference": [Point.of_reference(rounds[0])],
        "one offline run, by beta": [
            Point.of(summary, beta) for beta, summary in zip(BETAS, offline, strict=True)
        ],
        "rounds, beta 0.1": [Point.of(summary, str(number)) for number, summary in enumerate(rounds, 1)],
    }
    save_png(score_against_kl(curves, limit=limit_points(study["best_of"]["limit"])), args.figure)


if __name__ == "__main__":
    main()
