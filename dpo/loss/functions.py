"""The losses: pure functions of B pairs of completions and the options, by the names of `loss.type`.

Each returns (B,) losses in nats (unless its docstring says otherwise) with gradient to the policy. Below,
y_w is the chosen and y_l the rejected completion of a prompt x, |y| is its length in tokens, and

    h_w  = log pi(y_w|x) - log ref(y_w|x)    `pairs.chosen_logratios`, sums over the completion
    h_l  = log pi(y_l|x) - log ref(y_l|x)    `pairs.rejected_logratios`
    h    = h_w - h_l                         `pairs.margins`, or `margins` for other divergences than the
                                             reverse KL, where h_w and h_l are f'(pi / ref)
    m_w  = log pi(y_w|x) / |y_w|             `pairs.chosen_means`, means over the completion; m_l likewise
    beta = `loss.beta` > 0,  eps = `loss.label_smoothing` in [0, 0.5),  sigma(z) = 1 / (1 + exp(-z))

Where policy and reference are equal, h = h_w = h_l = 0. First come losses that compare a pair under policy
and reference, then the one over rankings, then those without a reference.
"""

import math

import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor

from dpo.config import LossConfig
from dpo.loss.f_divergences import margins
from dpo.loss.pairs import Pairs


def sigmoid(pairs: Pairs, loss: LossConfig) -> Tensor:
    """DPO; with label smoothing, conservative DPO. The default, and the one to compare others with.

        -(1 - eps) log sigma(beta h) - eps log sigma(-beta h)

    arXiv 2305.18290, Eq. 7; eps, the assumed share of flipped labels, as in the authors' note on conservative
    DPO. With eps > 0 the minimum is at a finite margin, so that the margins of pairs that are already learned
    stop growing. ln 2 where policy = reference.
    """
    return _smoothed_logistic(loss.beta * margins(pairs, loss), loss.label_smoothing)


def robust(pairs: Pairs, loss: LossConfig) -> Tensor:
    """Robust DPO: an unbiased estimate of the loss without noise where labels are flipped at a known rate.

        [-(1 - eps) log sigma(beta h) + eps log sigma(-beta h)] / (1 - 2 eps)

    arXiv 2403.00409 (rDPO's de-biased loss); eps in (0, 0.5) is the rate of flipped labels. For noisy labels;
    unlike conservative DPO it keeps increasing margins. ln 2 where policy = reference.
    """
    logits, smoothing = loss.beta * margins(pairs, loss), loss.label_smoothing
    kept, flipped = -F.logsigmoid(logits), -F.logsigmoid(-logits)
    return ((1 - smoothing) * kept - smoothing * flipped) / (1 - 2 * smoothing)


def exo_pair(pairs: Pairs, loss: LossConfig) -> Tensor:
    """EXO on pairs: the reverse KL to the smoothed label, where DPO has the forward KL.

        sigma(beta h) [log sigma(beta h) - log(1 - eps)] + sigma(-beta h) [log sigma(-beta h) - log eps]

    arXiv 2402.00856, Eq. 16; eps in (0, 0.5), such as 0.001. Mode-seeking instead of mode-covering.
    ln(1/2) - (ln(1 - eps) + ln eps) / 2 where policy = reference.
    """
    logits, smoothing = loss.beta * margins(pairs, loss), loss.label_smoothing
    chosen_wins = torch.sigmoid(logits) * (F.logsigmoid(logits) - math.log1p(-smoothing))
    return chosen_wins + torch.sigmoid(-logits) * (F.logsigmoid(-logits) - math.log(smoothing))


def ipo(pairs: Pairs, loss: LossConfig) -> Tensor:
    """IPO: a squared distance to a target margin, so that certain preferences do not drive it to infinity.

        (h - 1 / (2 beta))^2            in nats^2

    arXiv 2310.12036, Eq. 17, where beta is called tau; h is the paper's, a difference of sums over the
    completion. For data with few and certain preferences per prompt. 1 / (4 beta^2) where policy = reference.
    """
    return (margins(pairs, loss) - 1 / (2 * loss.beta)) ** 2


def hinge(pairs: Pairs, loss: LossConfig) -> Tensor:
    """Hinge loss: no gradient from pairs whose margin is 1 / beta or more.

        max(0, 1 - beta h)

    SLiC's calibration (arXiv 2305.10425, Eq. 2) on DPO's log-ratios, as in arXiv 2309.06657. 1 where policy =
    reference.
    """
    return torch.relu(1 - loss.beta * margins(pairs, loss))


def nca_pair(pairs: Pairs, loss: LossConfig) -> Tensor:
    """NCA on pairs: raises the likelihood of the chosen completion itself, not only relative to the rejected.

        -log sigma(beta h_w) - (1/2) log sigma(-beta h_w) - (1/2) log sigma(-beta h_l)

    arXiv 2402.05369, NCA for K = 2 with a certain preference. For tasks where the likelihood of the chosen
    completion must not fall, such as reasoning. 2 ln 2 where policy = reference.
    """
    chosen, rejected = loss.beta * pairs.chosen_logratios, loss.beta * pairs.rejected_logratios
    of_chosen = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen)
    return pairs.by_side(of_chosen, -0.5 * F.logsigmoid(-rejected))


def sppo_hard(pairs: Pairs, loss: LossConfig) -> Tensor:
    """SPPO with hard labels: each log-ratio has its own target, as in self-play between the two.

        (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2          in nats^2

    arXiv 2405.00675, Eq. 4.7 with win probabilities 1 and 0; 1 / beta is the paper's eta. For pairs sampled
    from the policy. 1 / (2 beta^2) where policy = reference.
    """
    target = 0.5 / loss.beta
    return (pairs.chosen_logratios - target) ** 2 + (pairs.rejected_logratios + target) ** 2


def apo_zero(pairs: Pairs, loss: LossConfig) -> Tensor:
    """APO-zero: raises the chosen and lowers the rejected completion, independently of each other.

        1 - sigma(beta h_w) + sigma(beta h_l)

    arXiv 2408.06266, Eq. 7. For chosen completions that are better than the policy's own. 1 where policy =
    reference.
    """
    chosen, rejected = loss.beta * pairs.chosen_logratios, loss.beta * pairs.rejected_logratios
    return pairs.by_side(torch.sigmoid(-chosen), torch.sigmoid(rejected))


def apo_down(pairs: Pairs, loss: LossConfig) -> Tensor:
    """APO-down: lowers both completions, the rejected one more.

        sigma(beta h_w) + 1 - sigma(beta h)

    arXiv 2408.06266, Eq. 8. For chosen completions that are worse than the policy's own. 1 where policy =
    reference.
    """
    return torch.sigmoid(loss.beta * pairs.chosen_logratios) + torch.sigmoid(-loss.beta * pairs.margins)


def discopop(pairs: Pairs, loss: LossConfig) -> Tensor:
    """DiscoPOP: logistic for pairs ranked wrong, exponential for pairs ranked right; found by search.

        (1 - m) (-log sigma(beta h)) + m exp(-beta h),   m = sigma(beta h / tau)

    arXiv 2406.08414, Eq. 5; tau = `loss.discopop_tau` in (0, 1), 0.05 in the paper. Not convex.
    (ln 2 + 1) / 2 where policy = reference.
    """
    logits = loss.beta * margins(pairs, loss)
    mixing = torch.sigmoid(logits / loss.discopop_tau)
    # m exp(-beta h) as one exponential: as a product it is 0 times infinity at large negative margins.
    exponential = torch.exp(F.logsigmoid(logits / loss.discopop_tau) - logits)
    return (1 - mixing) * -F.logsigmoid(logits) + exponential


def sigmoid_norm(pairs: Pairs, loss: LossConfig) -> Tensor:
    """Length-normalised DPO: log-ratios per token, so that longer completions do not weigh more.

        -(1 - eps) log sigma(z) - eps log sigma(-z),   z = beta (h_w / |y_w| - h_l / |y_l|)

    arXiv 2411.15124, Eq. 6; eps as in `sigmoid`. Needs a larger beta, such as 5. ln 2 where policy =
    reference.
    """
    chosen = pairs.chosen_logratios / pairs.policy.chosen_tokens
    rejected = pairs.rejected_logratios / pairs.policy.rejected_tokens
    return _smoothed_logistic(loss.beta * (chosen - rejected), loss.label_smoothing)


def ipo_norm(pairs: Pairs, loss: LossConfig) -> Tensor:
    """Length-normalised IPO: the target is a margin per token, so that it does not depend on lengths.

        (h_w / |y_w| - h_l / |y_l| - 1 / (2 beta))^2

    arXiv 2310.12036, Eq. 17, on log-ratios per token; what TRL calls ipo. 1 / (4 beta^2) where policy =
    reference.
    """
    chosen = pairs.chosen_logratios / pairs.policy.chosen_tokens
    rejected = pairs.rejected_logratios / pairs.policy.rejected_tokens
    return (chosen - rejected - 1 / (2 * loss.beta)) ** 2


def aot(pairs: Pairs, loss: LossConfig) -> Tensor:
    """AOT on pairs: the policy's margins dominate the reference's in distribution, not pair by pair.

        -(1 - eps) log sigma(beta d_i) - eps log sigma(-beta d_i),   d_i = u_(i) - v_(i)

    arXiv 2406.05882 (AOT paired): u_(i) and v_(i) are the i-th smallest of log pi(y_w|x) - log pi(y_l|x) and
    of the same under the reference, over all pairs of the optimizer step; eps in [0, 0.5). Term i belongs to
    the i-th place, not to the i-th pair. ln 2 where policy = reference.
    """
    assert pairs.reference is not None
    policy = (pairs.policy.chosen - pairs.policy.rejected).sort().values
    reference = (pairs.reference.chosen - pairs.reference.rejected).sort().values
    return _smoothed_logistic(loss.beta * (policy - reference), loss.label_smoothing)


def aot_unpaired(pairs: Pairs, loss: LossConfig) -> Tensor:
    """AOT without pairs: the log-ratios of chosen completions dominate those of rejected ones.

        -(1 - eps) log sigma(beta d_i) - eps log sigma(-beta d_i),   d_i = h_w(i) - h_l(i)

    arXiv 2406.05882 (AOT unpaired): both sorted over the optimizer step, so that chosen and rejected
    completions need not share a prompt; eps in [0, 0.5). ln 2 where all log-ratios are 0.
    """
    chosen, rejected = pairs.chosen_logratios.sort().values, pairs.rejected_logratios.sort().values
    return _smoothed_logistic(loss.beta * (chosen - rejected), loss.label_smoothing)


def plackett_luce(pairs: Pairs, loss: LossConfig) -> Tensor:
    """DPO over rankings: the likelihood that each completion comes before all that are ranked below it.

        - sum over k of log [ exp(beta h_k) / (exp(beta h_k) + sum over j below k of exp(beta h_j)) ]

    arXiv 2305.18290, Eq. 20 (appendix A.3), with h_k = log pi(y_k|x) - log ref(y_k|x). The pairs give the
    ranking: k is above j where (k, j) is a pair, so `data.pairing: all` gives the full ranking, and
    best-vs-rest the likelihood that the best comes first. A group of two is DPO. The mean is over groups, not
    pairs. ln K! where policy = reference, for a full ranking of K.

    Returns:
        (B,) the term of completion k in equal parts on its pairs (k, j): a group's sum is its loss.
    """
    chosen = pairs.policy.chosen_sequences
    assert chosen is not None
    below = chosen[:, None] == chosen  # (B, B): for the pair (k, j), all pairs (k, .)
    exponents = torch.where(below, -loss.beta * pairs.margins, -torch.inf)
    with_itself = torch.cat([exponents, torch.zeros_like(exponents[:, :1])], dim=1)
    return torch.logsumexp(with_itself, dim=1) / below.sum(1)


def simpo(pairs: Pairs, loss: LossConfig) -> Tensor:
    """SimPO: the mean log-prob is the reward, and the chosen completion must win by a margin.

        -log sigma(beta (m_w - m_l) - gamma)

    arXiv 2405.14734, Eq. 6; gamma = `loss.simpo_gamma` >= 0, the target margin in units of beta m. The paper
    takes beta 2 to 10 and gamma 0.3 to 1.6: set beta, since the default for DPO is far too small. Without a
    reference only the learning rate keeps the policy near its start.
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


def sft(pairs: Pairs, loss: LossConfig) -> Tensor:
    """Next-token training on the chosen completion, for mixtures such as MPO's.

        -m_w

    The generation loss of MPO (arXiv 2411.10442), which is 0.8 sigmoid + 0.2 bco_pair + 1 sft: a mean over
    the tokens of each completion.
    """
    return -pairs.chosen_means


def _smoothed_logistic(logits: Tensor, smoothing: float) -> Tensor:
    return -(1 - smoothing) * F.logsigmoid(logits) - smoothing * F.logsigmoid(-logits)


def _log_odds(mean_logps: Tensor) -> Tensor:
    """log(p / (1 - p)) for p = exp(mean_logps); finite also where p rounds to 1."""
    below_one = mean_logps.clamp(max=-torch.finfo(mean_logps.dtype).eps)
    return below_one - torch.log(-torch.expm1(below_one))
