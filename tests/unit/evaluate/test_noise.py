"""The noise of sampling: its distribution, and the same numbers for rows together or apart."""

import numpy as np
import pytest
import torch

from dpo import random_bits
from dpo.evaluate.noise import ExponentialRace, exponentials
from dpo.random_bits import stream_key


def keys(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


def test_draws_are_exponential() -> None:
    drawn = exponentials(keys(*(stream_key(0, 0, sample) for sample in range(20))), 0, 50_000).double()
    assert drawn.min() > 0
    number = drawn.numel()
    # Deviations of at most 4 standard errors: moments of order 1 and 2 are 1 and 2, with variances 1 and 20.
    assert float(drawn.mean()) == pytest.approx(1, abs=4 / number**0.5)
    assert float(drawn.square().mean()) == pytest.approx(2, abs=4 * (20 / number) ** 0.5)
    for small in (1e-1, 1e-3, 1e-5):  # the small ones decide what is sampled
        expected = -np.expm1(-small) * number
        assert int((drawn < small).sum()) == pytest.approx(expected, abs=4 * expected**0.5)
    for left, right in ((drawn[:, :-1], drawn[:, 1:]), (drawn[:-1], drawn[1:])):  # steps, and streams
        assert abs(float(((left - 1) * (right - 1)).mean())) < 4 / number**0.5


@pytest.mark.parametrize("at_once", [1, 30, 10**6])
def test_rows_computed_together_or_apart_have_the_same_noise(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(random_bits.AT_ONCE, "cpu", at_once)
    scores, ids = torch.randn(5, 13, generator=torch.Generator().manual_seed(0)), torch.zeros(5, 1)
    race = ExponentialRace([1, 2, 3, 4, 5], 0.7, torch.device("cpu"))
    for step in range(3):
        expected = (scores / 0.7).softmax(-1) / exponentials(keys(1, 2, 3, 4, 5), step * 13, 13)
        assert torch.equal(race(ids.long(), scores), expected)


def test_it_waits_for_no_device() -> None:
    # Tensors of the meta device hold no values: whatever reads one raises.
    race = ExponentialRace([1, 2], 1.0, torch.device("meta"))
    assert race(torch.zeros(2, 1, device="meta"), torch.zeros(2, 13, device="meta")).shape == (2, 13)
