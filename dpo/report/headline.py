"""The few numbers that people look at first: as cards of the page, and as lines on the terminal."""

from typing import NamedTuple

from dpo.report.labels import counted, few

BELOW_ZERO = "a KL is never below 0: the estimate is, so the policy is hardly apart from the reference"


class Card(NamedTuple):
    """A question and the number that answers it."""

    question: str
    answer: str
    detail: str


def headline_cards(summary: dict[str, float]) -> list[Card]:
    """Did it learn the preference, what did it cost, does the text still read well; as far as it is known."""
    cards = []
    if "eval/rewards/accuracies" in summary:
        low, high = summary["eval/rewards/accuracies/low"], summary["eval/rewards/accuracies/high"]
        cards.append(
            Card(
                "Did it learn the preference?",
                f"{summary['eval/rewards/accuracies']:.1%}",
                f"of {counted(summary, 'eval/rewards/accuracies') or 'pairs'} ranked correctly, held out; "
                f"{low:.1%} to {high:.1%}",
            )
        )
    if "positive_share/policy" in summary:
        cards.append(
            Card(
                "Do the samples show it?",
                f"{summary['positive_share/reference']:.0%} → {summary['positive_share/policy']:.0%}",
                f"scored positive; win rate {summary['win_rate']:.0%} over the reference"
                f"{_of(summary, 'win_rate')}",
            )
        )
    if "judge/win_rate" in summary:
        low, high = summary["judge/win_rate/low"], summary["judge/win_rate/high"]
        first = summary.get("judge/first_wins", 0.5)
        cards.append(
            Card(
                "What does the judge say?",
                f"{summary['judge/win_rate']:.0%}",
                f"win rate over the reference, {low:.0%} to {high:.0%}; the answer that stood first won "
                f"{first:.0%}",
            )
        )
    if "kl/sequence" in summary:
        low, high = summary["kl/sequence/low"], summary["kl/sequence/high"]
        cards.append(
            Card(
                "What did it cost?",
                f"{summary['kl/sequence']:.2f} nats",
                f"of KL from the reference per sequence, {low:.2f} to {high:.2f}"
                + (f"; {BELOW_ZERO}" if summary["kl/sequence"] < 0 else ""),
            )
        )
        cards.append(
            Card(
                "Does the text still read well?",
                f"{summary['distinct_2/reference']:.2f} → {summary['distinct_2/policy']:.2f}",
                f"distinct word pairs; perplexity under the reference "
                f"{summary['perplexity/policy_samples']:.1f}",
            )
        )
    return cards


def headline(summary: dict[str, float]) -> str:
    """The same for the end of the command, one line per topic."""
    lines = [
        f"held-out loss {summary['eval/loss']:.4f}, reward accuracy {summary['eval/rewards/accuracies']:.3f} "
        f"[{summary['eval/rewards/accuracies/low']:.3f}, {summary['eval/rewards/accuracies/high']:.3f}]"
        f"{_of(summary, 'eval/rewards/accuracies')}"
    ]
    if "positive_share/policy" in summary:
        lines.append(
            f"scored positive: reference {summary['positive_share/reference']:.1%}, "
            f"policy {summary['positive_share/policy']:.1%}; win rate {summary['win_rate']:.1%}"
            f"{_of(summary, 'win_rate')}"
        )
    if "judge/win_rate" in summary:
        lines.append(
            f"judge: win rate {summary['judge/win_rate']:.1%} [{summary['judge/win_rate/low']:.1%}, "
            f"{summary['judge/win_rate/high']:.1%}]"
        )
    if "kl/sequence" in summary:
        lines.append(
            f"KL(policy || reference) {summary['kl/sequence']:.2f} [{summary['kl/sequence/low']:.2f}, "
            f"{summary['kl/sequence/high']:.2f}] nats per sequence; distinct "
            f"continuations: reference {summary['distinct_texts/reference']:.1%}, "
            f"policy {summary['distinct_texts/policy']:.1%}"
        )
        if summary["kl/sequence"] < 0:
            lines.append(BELOW_ZERO)
    return "\n".join([*lines, *filter(None, [few(summary)])])


def _of(summary: dict[str, float], name: str) -> str:
    number = counted(summary, name)
    return f" of {number}" if number else ""
