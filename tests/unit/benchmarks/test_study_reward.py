import numpy as np
import pytest

from benchmarks.study_reward import correlation


def test_the_correlation_is_within_queries() -> None:
    scores = np.array([[0.0, 1.0, 2.0], [10.0, 11.0, 12.0]])
    assert correlation(scores * 3 + 5, scores) == pytest.approx(1)
    # Queries that differ as a whole say nothing: one up, one down.
    assert correlation(np.array([[0.0, 1.0, 2.0], [5.0, 4.0, 3.0]]), scores) == pytest.approx(0)


def test_noise_is_not_correlated() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 4000, 4))
    assert correlation(first, second) == pytest.approx(0, abs=0.03)  # standard deviation 0.009
    assert correlation(first + second, second) == pytest.approx(0.5**0.5, abs=0.03)
