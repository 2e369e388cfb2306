"""The table of labels: order, intervals, and names that it does not know."""

from dpo.report import labels
from dpo.report.labels import LABELS, Measure, measures
from dpo.report.model_card import SHOWN


def test_an_unknown_metric_has_its_own_name() -> None:
    assert labels.full("kl/sequence") == "KL(policy || reference), nats per sequence"
    assert labels.short("kl/sequence") == "KL, nats per sequence"
    assert labels.full("mine") == labels.short("mine") == "mine"


def test_without_a_short_form_the_full_one_is_used() -> None:
    assert labels.short("eval/loss") == labels.full("eval/loss") == "held-out loss"


def test_no_two_metrics_have_the_same_label() -> None:
    assert len({label.full for label in LABELS.values()}) == len(LABELS)
    shorts = [labels.short(name) for name in LABELS]
    assert len({*shorts}) == len(shorts)


def test_measures_have_the_order_of_the_table_and_unknown_ones_follow() -> None:
    summary = {"mine": 2.0, "kl/token": 0.25, "eval/loss": 0.5, "eval/loss/low": 0.4, "eval/loss/high": 0.6}
    summary |= {"eval/num_pairs": 1200.0, "source/a/accuracy": 0.5, "source/a/pairs": 3.0}
    assert measures(summary) == [
        Measure("held-out loss", 0.5, "0.400 to 0.600", "1,200 pairs"),
        Measure("KL(policy || reference), nats per token", 0.25, "", ""),
        Measure("mine", 2.0, "", ""),
        Measure("source/a/accuracy", 0.5, "", "3 pairs"),
    ]
    sampled = {"win_rate": 0.5, "samples/num_prompts": 64.0, "length/accuracy/longer_chosen": 1.0}
    assert [row.counted for row in measures(sampled)] == ["64 prompts", ""]


def test_every_metric_of_a_card_has_a_label() -> None:
    assert {*SHOWN} <= LABELS.keys()
