"""Which reward is higher, and how far rewards must differ for that."""

import pytest
import torch

from dpo.config import LossConfig
from dpo.loss.accuracy import ROUNDING, accuracies
from dpo.loss.pairs import PairLogProbs
from dpo.loss.preference_loss import preference_loss


def log_probs(chosen: list[float], rejected: list[float], tokens: int = 8) -> PairLogProbs:
    lengths = torch.full((len(chosen),), tokens)
    return PairLogProbs(
        chosen=torch.tensor(chosen, dtype=torch.float64),
        rejected=torch.tensor(rejected, dtype=torch.float64),
        chosen_tokens=lengths,
        rejected_tokens=lengths,
    )


def found(kind: str, margins: list[float], dtype: str, beta: float = 0.1) -> list[float]:
    """The accuracies of pairs with these margins in nats, of completions of 8 tokens each."""
    loss = LossConfig(type=kind, beta=beta)
    zeros = [0.0] * len(margins)
    policy = log_probs(margins, zeros)
    result = preference_loss(policy, log_probs(zeros, zeros), loss)
    return accuracies(result, policy, loss, dtype).tolist()


def test_higher_is_1_lower_0_and_a_tie_one_half() -> None:
    assert found("sigmoid", [1.0, -1.0, 0.0], "float32") == [1.0, 0.0, 0.5]
    assert found("sigmoid", [1.0, -1.0, 0.0], "bfloat16") == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["sigmoid", "ipo", "sigmoid_norm", "simpo"])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_rounding_of_16_tokens_is_a_tie_in_the_unit_of_every_loss(
    dtype: str, kind: str, beta: float
) -> None:
    edge = 4 * ROUNDING[dtype]  # the square root of 16 tokens
    margins = [0.9 * edge, -0.9 * edge, 1.1 * edge, -1.1 * edge]
    assert found(kind, margins, dtype, beta) == [0.5, 0.5, 1.0, 0.0]
