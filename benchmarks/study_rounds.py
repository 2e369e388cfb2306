"""Rounds on excerpts of novels against offline runs of as many pairs; docs/results.md has the command.

Reads what `dpo rounds` and `dpo best-of` wrote, and of the offline runs docs/study.json.
"""

import argparse
import json
from pathlib import Path

from benchmarks.study_numbers import Summary, with_ends
from benchmarks.study_reward import RewardQuality, rewards_of_samples
from benchmarks.study_sentiment_tables import score_at
from dpo.commands.frontier import limit_points
from dpo.report.figures import Point, save_png, score_against_kl
from dpo.report.markdown import table

OFFLINE = "DPO, beta {}"
BETAS = ("1", "0.3", "0.1", "0.05")
"""Of the offline runs, by ascending KL."""


def rounds_table(rounds: list[Summary], offline: list[Summary], rewards: list[RewardQuality]) -> str:
    """Each round beside the score of the offline runs at its KL, interpolated between their last steps."""
    head = ["round", "KL, nats", "mean score", "offline at that KL", "positive", "win rate", "accuracy"]
    head.append("correlation with the score")
    names = ("positive_share/policy", "win_rate", "eval/rewards/accuracies")
    rows = [
        [
            str(number),
            with_ends(summary, "kl/sequence"),
            with_ends(summary, "score/policy"),
            score_at(offline, summary["kl/sequence"]),
            *(with_ends(summary, name) for name in names),
            f"{reward.rho:.2f}",
        ]
        for number, (summary, reward) in enumerate(zip(rounds, rewards, strict=True), 1)
    ]
    return table(head, rows)


def main() -> None:
    """Prints the table and draws the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=Path, required=True, help="the folder of dpo rounds")
    parser.add_argument("--model", required=True, help="the model that the rounds started from")
    parser.add_argument("--samples", type=Path, required=True, help="samples.jsonl of dpo best-of")
    parser.add_argument("--study", type=Path, default=Path("docs/study.json"))
    parser.add_argument("--figure", type=Path, required=True)
    args = parser.parse_args()
    rounds: list[Summary] = json.loads((args.rounds / "rounds.json").read_text())
    runs = {str(number): args.rounds / f"round_{number}" / "run" for number in range(1, len(rounds) + 1)}
    rewards = rewards_of_samples(args.model, runs, args.samples)
    study = json.loads(args.study.read_text())
    offline = [study["books"][OFFLINE.format(beta)] for beta in BETAS]
    print(rounds_table(rounds, offline, [*rewards.values()]))
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
