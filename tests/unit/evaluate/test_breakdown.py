"""Metrics of the pairs, length bias and sources by hand."""

from dataclasses import replace

import numpy as np
import pytest

from dpo.data.notes import RowNotes, SourceGroups
from dpo.evaluate.breakdown import length_summary, margin_parts, pair_summary, source_summary
from dpo.evaluate.rewards import PairScores


def scores(chosen_tokens: list[int], rejected_tokens: list[int], margins: list[float]) -> PairScores:
    zeros = np.zeros(len(margins))
    return PairScores(
        groups=np.arange(len(margins)),
        losses=zeros,
        units=np.ones(len(margins)),
        chosen_rewards=np.array(margins),
        rejected_rewards=zeros,
        correct=(np.sign(margins) + 1) / 2,
        chosen_logps=zeros,
        rejected_logps=zeros,
        reference_logps=np.zeros((len(margins), 2)),
        chosen_tokens=np.array(chosen_tokens),
        rejected_tokens=np.array(rejected_tokens),
    )


def of(name: str, groups: int) -> SourceGroups:
    return SourceGroups(name, groups, RowNotes())


def test_a_policy_that_learned_only_length_is_recognised() -> None:
    # The chosen is longer in 2 of the 4 pairs that differ; the reward is higher for the longer in all 4.
    found = length_summary(scores([5, 5, 2, 2, 3], [2, 2, 5, 5, 3], [1.0, 2.0, -1.0, -2.0, 7.0]))
    assert found["length/longer_chosen"] == 0.5
    assert found["length/longer_rewarded"] == 1.0
    assert found["length/accuracy/longer_chosen"] == 1.0
    assert found["length/accuracy/shorter_chosen"] == 0.0
    assert found["length/longer_chosen/low"] <= 0.5 <= found["length/longer_chosen/high"]


def test_a_tie_of_rewards_counts_half() -> None:
    assert length_summary(scores([5, 1], [2, 9], [0.0, 0.0]))["length/longer_rewarded"] == 0.5


def test_metrics_without_pairs_are_left_out() -> None:
    assert length_summary(scores([3], [3], [1.0])) == {}
    found = length_summary(scores([4], [3], [1.0]))
    assert "length/accuracy/longer_chosen" in found
    assert not any(name.startswith("length/accuracy/shorter_chosen") for name in found)


def test_every_source_has_its_own_accuracy() -> None:
    three = scores([1] * 4, [1] * 4, [1.0, -1.0, 2.0, 3.0])  # one group per pair
    found = source_summary(three, [of("a.jsonl", 2), of("b", 1), of("a.jsonl", 1)])
    assert found["source/a.jsonl/accuracy"] == 2 / 3
    assert found["source/a.jsonl/pairs"] == 3
    assert found["source/b/accuracy"] == found["source/b/accuracy/high"] == 1
    assert found["source/b/accuracy/low"] < 0.3  # one pair says little


def test_a_single_source_is_not_listed() -> None:
    assert source_summary(scores([1], [1], [1.0]), [of("a", 1)]) == {}
    assert source_summary(scores([1], [1], [1.0]), []) == {}


def test_the_summary_of_pairs_has_means_intervals_and_both_breakdowns() -> None:
    two = scores([2, 1], [1, 2], [1.0, -3.0])
    found = pair_summary(two, [of("a", 1), of("b", 1)])
    assert found["eval/rewards/accuracies"] == 0.5
    assert found["eval/rewards/margins"] == -1.0
    assert (found["eval/rewards/margins/low"], found["eval/rewards/margins/high"]) == (-3.0, 1.0)
    assert found["eval/loss"] == found["eval/loss/low"] == 0.0
    assert (found["eval/num_pairs"], found["eval/num_prompts"]) == (2, 2)
    assert (found["length/pairs"], found["length/accuracy/longer_chosen/pairs"]) == (2, 1)
    assert found["length/longer_chosen"] == 0.5
    assert (found["source/a/accuracy"], found["source/b/accuracy"]) == (1.0, 0.0)


def labelled(desirable: list[float], undesirable: list[float]) -> PairScores:
    """Completions of one token with these rewards."""
    good, bad = len(desirable), len(undesirable)
    both = scores([1] * good + [0] * bad, [0] * good + [1] * bad, [*desirable, *([0.0] * bad)])
    return replace(both, rejected_rewards=np.array([0.0] * good + undesirable))


def test_margins_of_labels_are_distances_from_the_point_between_them() -> None:
    found = labelled([3.0, 1.0], [-1.0, 1.0, 0.0])  # means 2 and 0
    assert found.midpoint == 1.0
    assert found.margins.tolist() == [4.0, 0.0, 4.0, 0.0, 2.0]
    assert margin_parts(found).mean() == pytest.approx(2.0)
    summary = pair_summary(found, [])
    assert summary["eval/rewards/chosen"] == 2.0
    assert summary["eval/rewards/rejected"] == 0.0
    assert summary["eval/rewards/margins"] == pytest.approx(2.0)
    assert length_summary(found) == {}


def test_the_interval_of_a_difference_of_means_has_the_spread_of_both() -> None:
    rng = np.random.default_rng(0)
    desirable, undesirable = rng.normal(1, 1, 900), rng.normal(0, 2, 100)
    summary = pair_summary(labelled(desirable.tolist(), undesirable.tolist()), [])
    error = np.sqrt(desirable.var() / 900 + undesirable.var() / 100)
    half = (summary["eval/rewards/margins/high"] - summary["eval/rewards/margins/low"]) / 2
    assert half == pytest.approx(1.96 * error, rel=0.1)
