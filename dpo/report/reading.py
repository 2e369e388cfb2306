"""How to read a report: what its main numbers are in a good run, a bad one, and one to stop."""

from dpo.report.content import Section
from dpo.report.labels import short

COLUMNS = ("", "good", "bad", "stop: do not use this model")
READING: dict[str, tuple[str, str, str]] = {
    "eval/rewards/accuracies": (
        "above 50 %, and its interval too",
        "50 % is in the interval: held-out pairs show nothing that was learned",
        "well below 50 %: labels are flipped, or the reference is another model",
    ),
    "eval/loss": (
        "below where it started (0.693 for DPO), and still falling at the end",
        "rises while training loss falls: the policy overfits; train.keep_best keeps the best",
        "above where it started",
    ),
    "win_rate": (
        "its interval is above 50 %, and the samples show why",
        "50 % is in the interval: more prompts, or more training",
        "high, and the samples say the same thing every time: the scorer is fooled",
    ),
    "kl/sequence": (
        "above 0, and no larger than the score needs (dpo frontier draws that)",
        "near 0: hardly any training; or large for little gain: raise loss.beta",
        "as many nats as the samples have tokens: the text is no longer the reference's",
    ),
    "distinct_2/policy": (
        "near the reference's",
        "lower: fewer ways to say it",
        "a fraction of the reference's: every sample is the same",
    ),
    "repetition/policy": (
        "near the reference's",
        "higher: texts repeat themselves",
        "near 1: texts loop",
    ),
    "length/longer_rewarded": (
        "near the share in which the label prefers the longer completion",
        "above it: length was learned beside the preference",
        "near 100 %: only length was learned",
    ),
}
"""Metric -> good, bad, stop."""


def reading(summary: dict[str, float]) -> Section:
    """The guide for the metrics that a summary has; without rows if it has none of them."""
    return Section(
        title="How to read this report",
        notes=["An interval that holds both a good and a bad value says that this run cannot tell."],
        columns=COLUMNS,
        rows=[(short(name), *texts) for name, texts in READING.items() if name in summary],
    )
