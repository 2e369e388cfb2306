"""Losses over more than two completions of a prompt, on the log-probs that a tree gives once for all."""

import torch
from torch import Tensor

from dpo.config import LossConfig
from dpo.loss.pairs import Pairs


def plackett_luce(pairs: Pairs, loss: LossConfig) -> Tensor:
    """DPO over rankings: the likelihood that each completion comes before all that are ranked below it.

        - sum over k of log [ exp(beta h_k) / (exp(beta h_k) + sum over j below k of exp(beta h_j)) ]

    arXiv 2305.18290, Eq. 20 (appendix A.3), with h_k = log pi(y_k|x) - log ref(y_k|x). The ranking is in the
    pairs: k comes before j where (k, j) is one, so `data.pairing: all` gives the full ranking, and
    best-vs-rest the likelihood that the best comes first. A group of two is DPO. A mean over groups, not
    pairs. ln K! where policy = reference, for a full ranking of K.

    Returns:
        (B,) the term of each completion k, in equal parts on the pairs (k, j): a group's add up to its loss.
    """
    chosen = pairs.policy.chosen_sequences
    assert chosen is not None
    _, ranked, counts = torch.unique(chosen, return_inverse=True, return_counts=True)  # R completions k
    below = torch.arange(len(counts), device=ranked.device)[:, None] == ranked  # (R, B) j below k
    exponents = torch.where(below, -loss.beta * pairs.margins, -torch.inf)
    with_itself = torch.cat([exponents, torch.zeros_like(exponents[:, :1])], dim=1)
    shares: Tensor = (torch.logsumexp(with_itself, dim=1) / counts)[ranked]
    return shares
