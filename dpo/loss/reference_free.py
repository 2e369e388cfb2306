"""Losses without a reference: they need no cache. Notation as in `dpo.loss.paired`; |y| counts tokens, and

m_w = log pi(y_w|x) / |y_w|    `pairs.chosen_means`, and m_l the same of the rejected completion.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from dpo.config import LossConfig
from dpo.loss.pairs import Pairs


def simpo(pairs: Pairs, loss: LossConfig) -> Tensor:
    """SimPO: the mean log-prob is the reward, and the chosen one must win by a margin.

        -log sigma(beta (m_w - m_l) - gamma)

    arXiv 2405.14734, Eq. 6; gamma = `loss.simpo_gamma` >= 0, the target margin in units of beta m. The paper
    takes beta 2 to 10 and gamma 0.3 to 1.6: set beta, DPO's default is far too small. Where a reference is
    not at hand; nothing holds the policy near its start but the learning rate.
    """
    return -F.logsigmoid(loss.beta * (pairs.chosen_means - pairs.rejected_means) - loss.simpo_gamma)


def orpo(pairs: Pairs, loss: LossConfig) -> Tensor:
    """ORPO: next-token training on the chosen completion, with a penalty on the odds of the rejected one.

        -m_w - beta log sigma(log odds(m_w) - log odds(m_l)),   log odds(m) = m - log(1 - exp(m))

    arXiv 2403.07691, Eqs. 3 to 7, where beta is called lambda; exp(m) is the geometric mean of the tokens'
    probabilities. To learn task and preference at once, from a base model.
    """
    odds = _log_odds(pairs.chosen_means) - _log_odds(pairs.rejected_means)
    return -pairs.chosen_means - loss.beta * F.logsigmoid(odds)


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) for p = exp(mean_logps); finite also where p rounds to 1."""
    below_one = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return below_one - torch.log(-torch.expm1(below_one))
