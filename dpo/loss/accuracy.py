"""Reward accuracy: whether the chosen completion of a pair has the higher reward, beyond rounding.

Training metrics and evaluation count by the same rule. A policy equal to the reference has 0.5. Completions
with labels have no rival; their rewards are compared with a point between those of both labels.
"""

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpo.config import LossConfig
from dpo.loss.catalog import kind_of, names_of
from dpo.loss.pairs import PairLogProbs
from dpo.loss.preference_loss import PairLosses

Float64s = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]

ROUNDING = {"float32": 4e-6, "bfloat16": 0.05}
"""Compute type -> the largest difference seen between two computations of one sequence, in nats, per square
root of its tokens: rounding errors have random signs."""


def accuracies(result: PairLosses, policy: PairLogProbs, loss: LossConfig, dtype: str) -> Tensor:
    """1 where the chosen completion has the higher reward, 0 where the rejected one has, 0.5 for a tie.

    Rewards that differ by no more than the rounding of their log-probs are a tie.

    Args:
        result: Rewards of B pairs.
        policy: Their completions' lengths.
        loss: Decides the unit of the rewards, as in `preference_loss`.
        dtype: Compute type of the log-probs.

    Returns:
        (B,) float64.
    """
    kind = kind_of(names_of(loss)[0])
    tokens = (policy.chosen_tokens.double(), policy.rejected_tokens.double())
    if kind.per_token or not kind.needs_reference:  # rewards are means over tokens
        tokens = (1 / tokens[0], 1 / tokens[1])
    margins = result.chosen_rewards.double() - result.rejected_rewards.double()
    tie = margins.abs() <= loss.beta * ROUNDING[dtype] * (tokens[0] + tokens[1]).sqrt()
    return (margins.sign() / 2 + 0.5).masked_fill(tie, 0.5)


def label_accuracies(distances: Float64s, num_tokens: Int64s, loss: LossConfig, dtype: str) -> Float64s:
    """1 where the reward of a labelled completion lies on its label's side, 0 on the other, 0.5 for a tie.

    Args:
        distances: (P,) how far it lies on its label's side of the point between both labels.
        num_tokens: (P,) tokens of the completion.
        loss: As in `accuracies`.
        dtype: Compute type of the log-probs.
    """
    tie = np.abs(distances) <= loss.beta * ROUNDING[dtype] * np.sqrt(num_tokens)
    return np.where(tie, 0.5, np.sign(distances) / 2 + 0.5)
