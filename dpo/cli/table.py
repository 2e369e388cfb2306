"""The commands."""

COMMANDS = {
    "sft": "train a model on text or on chosen completions, also from random weights",
    "precompute-ref": "fill the cache of reference log-probabilities",
    "train": "optimize the policy on preferences, reading the cache",
    "evaluate": "held-out metrics, samples side by side, and the report",
    "best-of": "the reference's best of n continuations, and the score that no policy exceeds at a KL",
}
