"""The commands of `dpo`, in the order of `--help`, and what each is for."""

CONFIGURED = {
    "sft": "train a model on text or on chosen completions, also from random weights",
    "precompute-ref": "fill the cache of reference log-probabilities",
    "train": "optimize the policy on preferences, reading the cache",
    "evaluate": "held-out metrics, samples side by side, and the report",
    "best-of": "the reference's best of n continuations, and the score that no policy exceeds at a KL",
}
"""Commands whose only options are the keys of a configuration."""
TOOLS = {
    "data": "what the data holds: lengths, repetition, contradictions, suspected flips, CHES",
    "plan": "memory, time and disk of a run, before it is started",
    "frontier": "several betas and the SFT baseline on one cache: score against KL",
    "rounds": "on-policy: sample, score, pair, train, and again with the next prompts",
    "compare": "runs side by side: settings, numbers, curves",
    "cache": "info, verify or prune: look after the reference cache",
    "chat": "talk to the reference and the trained policy, side by side",
    "init": "copy the ready-made configurations and launch scripts into a folder",
    "convert": "a YAML configuration of TRL or the alignment-handbook as one of ours",
}
"""Commands with options of their own; see `dpo.cli.tools`."""
CHECK = {
    "check": "validate configuration, model files and some rows (--exact: all) for a command, default: train"
}
COMMANDS = CONFIGURED | TOOLS | CHECK
