"""How far the policy has moved: KL(policy || reference), estimated from the policy's own samples.

The samples must come from the unmodified policy (temperature 1, no top-k, no top-p), so that the mean of
their log-ratios is the KL. Every token that was drawn counts, EOS included.
"""

import numpy as np
import numpy.typing as npt

from dpo.evaluate.statistics import Interval, mean_interval, ratio_interval


def kl_summary(
    policy_logps: npt.ArrayLike,
    reference_logps: npt.ArrayLike,
    num_tokens: npt.ArrayLike,
    clusters: npt.ArrayLike,
) -> dict[str, float]:
    """KL(policy || reference) = E_policy[log p_policy(y | x) - log p_reference(y | x)], in nats.

    Args:
        policy_logps: (N,) summed log-probs of N policy samples under the policy, in nats.
        reference_logps: (N,) the same samples under the reference.
        num_tokens: (N,) tokens in each sum.
        clusters: (N,) which prompt a sample belongs to.

    Returns:
        `kl/sequence` (the mean of the summed log-ratios) and `kl/token` (their sum over the sum of tokens),
        each with `/low` and `/high`; an estimate may be slightly negative where the KL is near 0. And
        `perplexity/policy_samples`, the perplexity of the samples under the reference: exp of its nats per
        token.
    """
    log_ratios = np.asarray(policy_logps, np.float64) - np.asarray(reference_logps, np.float64)
    surprise = ratio_interval(-np.asarray(reference_logps, np.float64), num_tokens, clusters)
    perplexity = Interval(*np.exp(surprise).tolist())
    return {
        **perplexity.under("perplexity/policy_samples"),
        **mean_interval(log_ratios, clusters).under("kl/sequence"),
        **ratio_interval(log_ratios, num_tokens, clusters).under("kl/token"),
    }
