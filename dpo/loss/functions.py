"""Losses that compare a pair of completions under policy and reference.

Each is a pure function of B pairs and the options, and gives (B,) losses in nats (unless it says otherwise)
with gradient to the policy. Throughout, y_w is the chosen and y_l the rejected completion of prompt x, and

    h_w = log pi(y_w|x) - log ref(y_w|x)    `pairs.chosen_logratios`, sums over the completion
    h_l = log pi(y_l|x) - log ref(y_l|x)    `pairs.rejected_logratios`
    h   = h_w - h_l                         `pairs.margins`
    beta = `loss.beta` > 0, sigma(z) = 1 / (1 + exp(-z))

Policy = reference means h = h_w = h_l = 0.
"""

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor

from dpo.config import LossConfig
from dpo.loss.pairs import Pairs


def sigmoid(pairs: Pairs, loss: LossConfig) -> Tensor:
    """DPO, with label smoothing conservative DPO: the default, and the one to compare others with.

        -(1 - eps) log sigma(beta h) - eps log sigma(-beta h)

    arXiv 2305.18290, Eq. 7; eps = `loss.label_smoothing` in [0, 0.5), the assumed share of flipped labels, as
    in the authors' note on conservative DPO. With it the loss is least at a finite margin, so the policy
    does not run away on pairs that it has learned. ln 2 where policy = reference.
    """
    logits, smoothing = loss.beta * pairs.margins, loss.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def robust(pairs: Pairs, loss: LossConfig) -> Tensor:
    """Robust DPO: an unbiased estimate of the clean loss where labels are flipped at a known rate.

        [-(1 - eps) log sigma(beta h) + eps log sigma(-beta h)] / (1 - 2 eps)

    arXiv 2403.00409 (rDPO's de-biased loss); eps = `loss.label_smoothing` in (0, 0.5), the rate of flips.
    For noisy labels; unlike conservative DPO it goes on pushing margins apart. ln 2 where policy = reference.
    """
    logits, smoothing = loss.beta * pairs.margins, loss.label_smoothing
    kept, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - smoothing) * kept - smoothing * flipped) / (1 - 2 * smoothing)


def ipo(pairs: Pairs, loss: LossConfig) -> Tensor:
    """IPO: a squared distance to a margin, so that deterministic preferences do not drive it to infinity.

        (h - 1 / (2 beta))^2            in nats^2

    arXiv 2310.12036, Eq. 17, where beta is called tau; h is the paper's, a difference of sums over the
    completion (TRL divides each log-ratio by its length). For data in which each prompt has one, certain
    preference. 1 / (4 beta^2) where policy = reference.
    """
    return (pairs.margins - 1 / (2 * loss.beta)) ** 2


def hinge(pairs: Pairs, loss: LossConfig) -> Tensor:
    """The hinge: no gradient from pairs that are apart by 1 / beta already.

        max(0, 1 - beta h)

    SLiC's calibration (arXiv 2305.10425, Eq. 2) on DPO's log-ratios, as in arXiv 2309.06657. 1 where policy =
    reference.
    """
    return torch.relu(1 - loss.beta * pairs.margins)


def exo_pair(pairs: Pairs, loss: LossConfig) -> Tensor:
    """EXO on pairs: the reverse KL to the smoothed label, where DPO has the forward KL.

        sigma(beta h) [log sigma(beta h) - log(1 - eps)] + sigma(-beta h) [log sigma(-beta h) - log eps]

    arXiv 2402.00856, Eq. 16; eps = `loss.label_smoothing` in (0, 0.5), such as 0.001. Seeks a mode instead of
    covering all. ln(1/2) - (ln(1 - eps) + ln eps) / 2 where policy = reference.
    """
    logits = loss.beta * pairs.margins
    smoothing = torch.tensor(loss.label_smoothing, dtype=logits.dtype, device=logits.device)
    return torch.sigmoid(logits) * (F.logsigmoid(logits) - torch.log1p(-smoothing)) + torch.sigmoid(
        -logits
    ) * (F.logsigmoid(-logits) - torch.log(smoothing))


def nca_pair(pairs: Pairs, loss: LossConfig) -> Tensor:
    """NCA on pairs: raises the chosen completion itself, and not only above the rejected one.

        -log sigma(beta h_w) - (1/2) log sigma(-beta h_w) - (1/2) log sigma(-beta h_l)

    arXiv 2402.05369, NCA for K = 2 with a certain preference. For tasks where the likelihood of the chosen
    must not fall, such as reasoning. 2 ln 2 where policy = reference.
    """
    chosen, rejected = loss.beta * pairs.chosen_logratios, loss.beta * pairs.rejected_logratios
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def sppo_hard(pairs: Pairs, loss: LossConfig) -> Tensor:
    """SPPO with hard labels: each log-ratio has a target of its own, as in self-play between the two.

        (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2          in nats^2

    arXiv 2405.00675, Eq. 4.7 with win probabilities 1 and 0; 1 / beta is the paper's eta. For pairs sampled
    from the policy. 1 / (2 beta^2) where policy = reference.
    """
    target = 0.5 / loss.beta
    return (pairs.chosen_logratios - target) ** 2 + (pairs.rejected_logratios + target) ** 2


def apo_zero(pairs: Pairs, loss: LossConfig) -> Tensor:
    """APO-zero: raises the chosen and lowers the rejected completion, each by itself.

        1 - sigma(beta h_w) + sigma(beta h_l)

    arXiv 2408.06266, Eq. 7. Where the chosen completions are better than what the policy writes. 1 where
    policy = reference.
    """
    chosen, rejected = loss.beta * pairs.chosen_logratios, loss.beta * pairs.rejected_logratios
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(pairs: Pairs, loss: LossConfig) -> Tensor:
    """APO-down: lowers both completions, and the rejected one more.

        sigma(beta h_w) + 1 - sigma(beta h)

    arXiv 2408.06266, Eq. 8. Where the chosen completions are worse than what the policy writes. 1 where
    policy = reference.
    """
    return torch.sigmoid(loss.beta * pairs.chosen_logratios) + torch.sigmoid(-loss.beta * pairs.margins)


def discopop(pairs: Pairs, loss: LossConfig) -> Tensor:
    """DiscoPOP: logistic for pairs ranked wrong, exponential for pairs ranked right, found by search.

        (1 - m) (-log sigma(beta h)) + m exp(-beta h),   m = sigma(beta h / tau)

    arXiv 2406.08414, Eq. 5; tau = `loss.discopop_tau` in (0, 1), the paper's 0.05. Not convex. (ln 2 + 1) / 2
    where policy = reference.
    """
    logits = loss.beta * pairs.margins
    mixing = torch.sigmoid(logits / loss.discopop_tau)
    # One exponent for m exp(-beta h): apart, an infinite factor meets a zero.
    exponential = torch.exp(F.logsigmoid(logits / loss.discopop_tau) - logits)
    return (1 - mixing) * -F.logsigmoid(logits) + exponential


def sigmoid_norm(pairs: Pairs, loss: LossConfig) -> Tensor:
    """DPO with log-ratios a token: a longer completion has no larger say.

        -(1 - eps) log sigma(z) - eps log sigma(-z),   z = beta (h_w / |y_w| - h_l / |y_l|)

    Length-normalised DPO of arXiv 2411.15124, Eq. 6; |y| in tokens, `loss.label_smoothing` as in `sigmoid`.
    It wants a larger beta, such as 5. ln 2 where policy = reference.
    """
    chosen = pairs.chosen_logratios / pairs.policy.chosen_tokens
    rejected = pairs.rejected_logratios / pairs.policy.rejected_tokens
    logits, smoothing = loss.beta * (chosen - rejected), loss.label_smoothing
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


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
