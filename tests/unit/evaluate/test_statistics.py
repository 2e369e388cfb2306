"""Intervals against closed forms and their coverage in simulation; KL against full enumeration."""

import math

import numpy as np
import pytest

from dpo.evaluate.divergence import kl_summary
from dpo.evaluate.statistics import (
    Interval,
    distinct_n,
    mean_by_cluster,
    mean_interval,
    ratio_interval,
    repetition,
    share_by_cluster,
    win_rate,
)


def test_the_mean_weighs_values_equally_not_clusters() -> None:
    # (1 + 2 + 3 + 10) / 4 = 4; the mean of the cluster means would be (2 + 10) / 2 = 6.
    assert mean_interval([1, 2, 3, 10], [0, 0, 0, 1]).mean == 4.0


def test_a_constant_has_an_interval_of_width_0() -> None:
    assert mean_interval([0.5] * 6, [0, 0, 1, 1, 2, 2]) == Interval(0.5, 0.5, 0.5)


def test_independent_values_give_the_normal_interval() -> None:
    # 400 coin flips, 200 heads: 0.5 +- 1.96 * sqrt(0.25 / 400) = 0.5 +- 0.049.
    values = np.tile([0.0, 1.0], 200)
    interval = mean_interval(values, np.arange(400))
    assert interval.low == pytest.approx(0.451, abs=0.005)
    assert interval.high == pytest.approx(0.549, abs=0.005)


def test_copies_of_a_value_within_its_cluster_do_not_narrow_the_interval() -> None:
    values = np.tile([0.0, 1.0], 50)
    once = mean_interval(values, np.arange(100))
    four_times = mean_interval(np.repeat(values, 4), np.repeat(np.arange(100), 4))
    assert four_times == pytest.approx(once)


def test_a_higher_level_is_wider() -> None:
    values = np.arange(50.0)
    narrow = mean_interval(values, np.arange(50), level=0.5)
    wide = mean_interval(values, np.arange(50), level=0.99)
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high


def test_intervals_of_clustered_values_have_their_nominal_coverage() -> None:
    # 60 prompts of 4 samples: a normal effect of the prompt and of the sample, and a true mean of 0. The
    # percentile bootstrap covers slightly less than 95 %. Ignoring the prompts, the standard error would be
    # sqrt(1.25 / 240) = 0.072 instead of sqrt((1 + 0.25 / 4) / 60) = 0.133: 1.96 of it are 1.06 true, 71 %.
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(60), 4)
    covered = ignoring_prompts = 0
    for _ in range(300):
        values = np.repeat(rng.normal(size=60), 4) + 0.5 * rng.normal(size=240)
        interval = mean_interval(values, clusters, num_resamples=400)
        covered += interval.low <= 0 <= interval.high
        naive = mean_interval(values, np.arange(240), num_resamples=400)
        ignoring_prompts += naive.low <= 0 <= naive.high
    assert 0.90 <= covered / 300 <= 0.98
    assert ignoring_prompts / 300 < 0.80


def test_the_interval_from_the_variance_between_clusters_is_that_of_the_bootstrap() -> None:
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 400, 1000)
    values = rng.normal(size=1000) + rng.normal(size=400)[clusters]
    found, resampled = mean_by_cluster(values, clusters), mean_interval(values, clusters)
    assert found.mean == pytest.approx(resampled.mean)
    assert found.low == pytest.approx(resampled.low, abs=0.02)
    assert found.high == pytest.approx(resampled.high, abs=0.02)


def test_a_mean_by_cluster_by_hand() -> None:
    # Deviations from the mean 2 add up to -2, 0 and 2 in the clusters: an error of sqrt(4 + 4) / 4 values.
    found = mean_by_cluster([1.0, 1.0, 2.0, 4.0], [0, 0, 1, 2])
    assert found == pytest.approx((2.0, 2 - 1.959964 * 8**0.5 / 4, 2 + 1.959964 * 8**0.5 / 4))


def test_a_share_has_wilsons_interval_also_where_all_are_equal() -> None:
    # 7 of 10 independent values: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    found = share_by_cluster([True] * 7 + [False] * 3, np.arange(10))
    assert found == pytest.approx((0.7, 0.39677, 0.89221), abs=1e-4)
    all_true = share_by_cluster([True] * 10, np.arange(10))
    assert all_true == pytest.approx((1.0, 10 / (10 + 1.959964**2), 1.0))
    none_true = share_by_cluster([False] * 10, np.arange(10))
    assert none_true == pytest.approx((0.0, 0.0, 1 - 10 / (10 + 1.959964**2)))


def test_copies_of_a_share_within_its_cluster_do_not_narrow_it() -> None:
    once = share_by_cluster([True, False, True, True], [0, 1, 2, 3])
    often = share_by_cluster([True, False, True, True] * 50, [0, 1, 2, 3] * 50)
    assert often == pytest.approx(once)
    sure = share_by_cluster([True] * 200, [0, 1, 2, 3] * 50)
    assert sure == pytest.approx(share_by_cluster([True] * 4, [0, 1, 2, 3]))


def test_six_wins_of_six_are_no_certainty() -> None:
    assert win_rate([1] * 6, [0] * 6, range(6)) == share_by_cluster([True] * 6, range(6))
    assert win_rate([1] * 6, [0] * 6, range(6)).low < 0.65
    tie = win_rate([1] * 6, [1] * 6, range(6))
    assert tie.low < 0.25 < tie.mean == 0.5 < 0.75 < tie.high


def test_a_ratio_is_a_ratio_of_sums() -> None:
    # (1 + 9) / (1 + 3) = 2.5; the mean of the ratios would be (1 + 3) / 2 = 2. A quarter of the resamples
    # has the first prompt alone, with 1, and a quarter the second, with 3: the ends.
    assert ratio_interval([1, 9], [1, 3], ["a", "b"]) == Interval(2.5, 1.0, 3.0)


def test_unequal_lengths_and_empty_input_are_errors() -> None:
    with pytest.raises(ValueError, match="3 clusters"):
        mean_interval([1, 2], [0, 1, 2])
    with pytest.raises(ValueError, match="at least 1"):
        mean_interval([], [])


def test_an_interval_has_the_keys_of_the_summary() -> None:
    assert Interval(1.0, 0.5, 2.0).under("kl/token") == {
        "kl/token": 1.0,
        "kl/token/low": 0.5,
        "kl/token/high": 2.0,
    }
    assert Interval.of(Interval(1.0, 0.5, 2.0).under("kl/token"), "kl/token") == Interval(1.0, 0.5, 2.0)


def test_a_tie_is_half_a_win() -> None:
    # won, tied, lost, tied: (1 + 0.5 + 0 + 0.5) / 4.
    assert win_rate([1, 2, 3, 4], [0, 2, 5, 4], range(4)).mean == 0.5
    assert win_rate([1, 1], [0, 1], range(2)).mean == 0.75


def test_distinct_pairs_are_counted_over_all_texts() -> None:
    # "a b a" has (a b), (b a); "a b" has (a b); "a" has none: 2 distinct of 3.
    assert distinct_n([["a", "b", "a"], ["a", "b"], ["a"]], 2) == pytest.approx(2 / 3)
    assert distinct_n([[1, 1, 1, 1]], 1) == 0.25
    assert distinct_n([["a"]], 2) == 0.0


def test_kl_of_draws_in_exact_proportion_is_the_sum_over_all_sequences() -> None:
    # Two tokens drawn independently from (3/4, 1/4) by the policy and from (1/2, 1/2) by the reference.
    # KL of one token = 3/4 ln(3/2) + 1/4 ln(1/2); of the sequence, twice that. Of 16 draws in exact
    # proportion 9 are (0, 0), 3 are (0, 1), 3 are (1, 0) and 1 is (1, 1).
    policy, reference = np.log([3 / 4, 1 / 4]), np.log([1 / 2, 1 / 2])
    draws = [(0, 0)] * 9 + [(0, 1)] * 3 + [(1, 0)] * 3 + [(1, 1)]
    policy_logps = [policy[first] + policy[second] for first, second in draws]
    reference_logps = [reference[first] + reference[second] for first, second in draws]
    summary = kl_summary(policy_logps, reference_logps, [2] * 16, np.arange(16))
    token = 3 / 4 * np.log(3 / 2) + 1 / 4 * np.log(1 / 2)
    assert summary["kl/sequence"] == pytest.approx(2 * token, abs=1e-12)
    assert summary["kl/token"] == pytest.approx(token, abs=1e-12)
    assert summary["kl/sequence/low"] < 2 * token < summary["kl/sequence/high"]
    assert summary["kl/token/low"] < token < summary["kl/token/high"]


def test_kl_per_token_counts_every_token_once() -> None:
    # Log-ratios 1 and 2 over 1 and 5 tokens: 3 / 6, not (1 + 0.4) / 2.
    assert kl_summary([0, 0], [-1, -2], [1, 5], [0, 1])["kl/token"] == 0.5


def test_repetition_looks_within_each_text() -> None:
    # "a b a b" has the pairs ab, ba, ab: one of three is a repeat. Equal texts do not count.
    assert repetition([["a", "b", "a", "b"]], 2) == pytest.approx(1 / 3)
    assert repetition([["a", "b"], ["a", "b"]], 2) == 0.0
    assert repetition([["a"] * 11], 2) == 0.9
    assert repetition([["a"], []], 2) == 0.0


def test_perplexity_of_the_samples_is_exp_of_the_references_nats_per_token() -> None:
    # Three sequences of 2, 2 and 4 tokens, each token with probability 1/8 under the reference.
    nats = math.log(8)
    summary = kl_summary([0, 0, 0], [-2 * nats, -2 * nats, -4 * nats], [2, 2, 4], [0, 1, 2])
    assert summary["perplexity/policy_samples"] == pytest.approx(8)
    assert summary["perplexity/policy_samples/high"] == pytest.approx(8)
