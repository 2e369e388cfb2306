"""Metrics of the pairs, length bias and sources by hand."""

import numpy as np

from dpo.data.dataset import SourceGroups
from dpo.evaluate.breakdown import length_summary, pair_summary, source_summary
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
    found = source_summary(
        three, [SourceGroups("a.jsonl", 2), SourceGroups("b", 1), SourceGroups("a.jsonl", 1)]
    )
    assert found["source/a.jsonl/accuracy"] == 2 / 3
    assert found["source/a.jsonl/pairs"] == 3
    assert found["source/b/accuracy"] == found["source/b/accuracy/high"] == 1
    assert found["source/b/accuracy/low"] < 0.3  # one pair says little


def test_a_single_source_is_not_listed() -> None:
    assert source_summary(scores([1], [1], [1.0]), [SourceGroups("a", 1)]) == {}
    assert source_summary(scores([1], [1], [1.0]), []) == {}


def test_the_summary_of_pairs_has_means_intervals_and_both_breakdowns() -> None:
    two = scores([2, 1], [1, 2], [1.0, -3.0])
    found = pair_summary(two, [SourceGroups("a", 1), SourceGroups("b", 1)])
    assert found["eval/rewards/accuracies"] == 0.5
    assert found["eval/rewards/margins"] == -1.0
    assert (found["eval/rewards/margins/low"], found["eval/rewards/margins/high"]) == (-3.0, 1.0)
    assert found["eval/loss"] == found["eval/loss/low"] == 0.0
    assert (found["eval/num_pairs"], found["eval/num_prompts"]) == (2, 2)
    assert (found["length/pairs"], found["length/accuracy/longer_chosen/pairs"]) == (2, 1)
    assert found["length/longer_chosen"] == 0.5
    assert (found["source/a/accuracy"], found["source/b/accuracy"]) == (1.0, 0.0)
