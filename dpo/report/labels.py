"""What people call the metrics."""

LABELS = {
    "eval/loss": "held-out loss",
    "eval/rewards/accuracies": "held-out reward accuracy",
    "eval/rewards/margins": "held-out reward margin",
    "score/reference": "mean score, reference",
    "score/policy": "mean score, policy",
    "positive_share/reference": "share scored positive, reference",
    "positive_share/policy": "share scored positive, policy",
    "win_rate": "policy scores higher than reference (a tie is half)",
    "kl/sequence": "KL(policy, reference), nats a sequence",
    "kl/token": "KL(policy, reference), nats a token",
    "distinct_2/reference": "distinct word pairs, reference",
    "distinct_2/policy": "distinct word pairs, policy",
    "distinct_texts/reference": "distinct continuations, reference",
    "distinct_texts/policy": "distinct continuations, policy",
    "repetition/reference": "word pairs said before in the same text, reference",
    "repetition/policy": "word pairs said before in the same text, policy",
    "perplexity/policy_samples": "perplexity of the policy's samples under the reference",
    "sample_tokens/reference": "tokens of a continuation, reference",
    "sample_tokens/policy": "tokens of a continuation, policy",
    "length/longer_chosen": "the label prefers the longer completion",
    "length/longer_rewarded": "the policy's reward prefers the longer completion",
    "length/accuracy/longer_chosen": "held-out accuracy where the longer is chosen",
    "length/accuracy/shorter_chosen": "held-out accuracy where the shorter is chosen",
}
"""What the report calls the keys of summary.json, in its order; other keys follow under their own name."""
