"""What people call the metrics: the one table that reports, cards, comparisons and figures take labels from.

Names are those of summary.json and metrics.jsonl. Other modules list only the names that they show.
"""

from typing import NamedTuple


class Label(NamedTuple):
    """What a metric is called."""

    full: str
    """With its unit, and the model that it belongs to."""
    short: str | None = None
    """For a column or row where it is clear that the policy is meant; None: as `full`."""


LABELS = {
    "eval/loss": Label("held-out loss"),
    "eval/rewards/accuracies": Label("held-out reward accuracy", "reward accuracy"),
    "eval/rewards/margins": Label("held-out reward margin", "reward margin"),
    "eval/rewards/chosen": Label("held-out reward of the chosen"),
    "eval/rewards/rejected": Label("held-out reward of the rejected"),
    "eval/logps/chosen": Label("held-out log-prob of the chosen, nats"),
    "eval/logps/rejected": Label("held-out log-prob of the rejected, nats"),
    "score/reference": Label("mean score, reference"),
    "score/policy": Label("mean score, policy", "mean score"),
    "positive_share/reference": Label("share scored positive, reference"),
    "positive_share/policy": Label("share scored positive, policy", "share scored positive"),
    "win_rate": Label("win rate of the policy over the reference (a tie counts half)", "win rate"),
    "judge/win_rate": Label(
        "win rate by the judge, in both orders (a tie counts half)", "win rate by the judge"
    ),
    "judge/ties": Label("verdicts of the judge that are ties"),
    "judge/orders_agree": Label("prompts on which the judge says the same in both orders"),
    "judge/first_wins": Label("verdicts for the answer that stands first (unbiased: 50 %)"),
    "judge/unclear": Label("prompts without a clear verdict, left out"),
    "kl/sequence": Label("KL(policy || reference), nats per sequence", "KL, nats per sequence"),
    "kl/token": Label("KL(policy || reference), nats per token", "KL, nats per token"),
    "distinct_2/reference": Label("distinct word pairs, reference"),
    "distinct_2/policy": Label("distinct word pairs, policy", "distinct word pairs"),
    "distinct_texts/reference": Label("distinct continuations, reference"),
    "distinct_texts/policy": Label("distinct continuations, policy", "distinct continuations"),
    "repetition/reference": Label("word pairs repeated within a text, reference"),
    "repetition/policy": Label("word pairs repeated within a text, policy", "repeated word pairs"),
    "perplexity/policy_samples": Label(
        "perplexity of the policy's samples under the reference", "perplexity under the reference"
    ),
    "sample_tokens/reference": Label("tokens per continuation, reference"),
    "sample_tokens/policy": Label("tokens per continuation, policy", "tokens per continuation"),
    "length/longer_chosen": Label("the label prefers the longer completion"),
    "length/longer_rewarded": Label("the policy's reward prefers the longer completion"),
    "length/accuracy/longer_chosen": Label("held-out reward accuracy where the longer is chosen"),
    "length/accuracy/shorter_chosen": Label("held-out reward accuracy where the shorter is chosen"),
    "perf/pairs_per_second": Label("pairs per second"),
    "perf/sequences_per_second": Label("sequences per second"),
    "perf/tokens_per_second": Label("tokens per second"),
    "perf/peak_memory_gb": Label("peak memory, GB"),
}
"""In the order of the reports."""


FEW = 50
"""Below this many prompts an interval is rough, and small changes cannot be told from chance."""
COUNTS = ("eval/num_pairs", "eval/num_prompts", "samples/num_prompts")
MEASURE_COLUMNS = ("measure", "value", "95 % interval", "of")
"""Of a table of metrics."""


class Measure(NamedTuple):
    """A row of a table of metrics."""

    label: str
    value: float
    interval: str
    """`low to high`; empty for a metric without an interval."""
    counted: str
    """Over how much it is: pairs or prompts; empty where that is not recorded."""


def full(name: str) -> str:
    """What a metric is called, with its unit; an unknown one by its own name."""
    return LABELS[name].full if name in LABELS else name


def short(name: str) -> str:
    """The same for a column or row where it is clear that the policy is meant."""
    return LABELS[name].short or LABELS[name].full if name in LABELS else name


def measures(summary: dict[str, float]) -> list[Measure]:
    """Every metric of a summary, in the order of the table; unknown ones follow."""
    names = [name for name in summary if not name.endswith(("/low", "/high", "/pairs", *COUNTS))]
    order = {name: number for number, name in enumerate(LABELS)}
    names.sort(key=lambda name: order.get(name, len(order)))
    return [
        Measure(full(name), summary[name], _interval(summary, name), counted(summary, name)) for name in names
    ]


def counted(summary: dict[str, float], name: str) -> str:
    """Over how much a metric is, such as `12 pairs` or `64 prompts`; empty where that is not recorded."""
    section = name.rpartition("/")[0]
    for key in (f"{name}/pairs", f"{section}/pairs", "eval/num_pairs" if name.startswith("eval/") else ""):
        if key in summary:
            return f"{summary[key]:,.0f} pairs"
    of_samples = not name.startswith(("eval/", "length/", "source/", "perf/"))
    return f"{summary[COUNTS[-1]]:,.0f} prompts" if of_samples and COUNTS[-1] in summary else ""


def few(summary: dict[str, float]) -> str:
    """A warning where the numbers of a summary rest on few prompts; else nothing."""
    numbers = [summary[name] for name in COUNTS[1:] if name in summary]
    if not numbers or min(numbers) >= FEW:
        return ""
    return (
        f"only {min(numbers):.0f} prompts: the intervals are rough, and a change within them may be chance "
        "(more held-out data, or evaluate.num_prompts)"
    )


def _interval(summary: dict[str, float], name: str) -> str:
    low, high = summary.get(f"{name}/low"), summary.get(f"{name}/high")
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
