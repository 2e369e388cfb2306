"""How well a policy's implicit reward predicts the score: it explains DPO's distance to the limit.

Over the reference's own samples for a query, the implicit reward log(policy / reference) has a correlation
rho with the score, whose standard deviation is sigma. For small tilts, the reference tilted by this reward
gains rho sigma sqrt(2 KL), and the best possible tilt gains sigma sqrt(2 KL): for the same gain the policy
needs 1 / rho^2 times the KL.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dpo.config import ModelConfig
from dpo.data.records import TokenIds
from dpo.engine.frozen import frozen_scorer
from dpo.engine.scoring import settle_layout
from dpo.evaluate.samples import PromptAndCompletion, log_probs
from dpo.files import read_lines
from dpo.model.probe_trees import trees_of
from dpo.model.tokenizer import load_tokenizer
from dpo.tracking.run_folder import RunFolder

SAMPLES_PER_QUERY = 4
BUDGET = 4096


class RewardQuality(NamedTuple):
    """A policy's implicit reward against the score, over samples of the reference."""

    rho: float
    """Correlation within queries."""
    predicted_gain: float
    """rho sigma sqrt(2 KL): gain in score that this reward predicts at the policy's KL, for small tilts."""
    gain: float
    """Mean score of the policy's samples minus that of the reference's."""


def correlation(rewards: np.ndarray, scores: np.ndarray) -> float:
    """Correlation of two (P, M) arrays, after subtracting the mean over the M samples of each query."""
    first, second = (values - values.mean(axis=1, keepdims=True) for values in (rewards, scores))
    return float((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()))


def rewards_of_samples(reference: str, runs: dict[str, Path], samples: Path) -> dict[str, RewardQuality]:
    """Run -> how well the implicit reward of its last model predicts the score.

    Args:
        reference: The reference model.
        runs: Name -> folder of an evaluated run.
        samples: samples.jsonl of `dpo best-of`.
    """
    tokenizer = load_tokenizer(ModelConfig(name_or_path=reference))
    rows = read_lines(samples)
    scores = np.asarray([row["reference_scores"] for row in rows])
    sequences: list[PromptAndCompletion] = [
        (_ids(tokenizer, row["prompt"]), _ids(tokenizer, text))
        for row in rows
        for text in row["reference"][:SAMPLES_PER_QUERY]
    ]

    def logps(model: str) -> np.ndarray:
        config = ModelConfig(name_or_path=model, dtype="float32")
        with frozen_scorer(config, sharded=False) as scorer:
            longest = max(sequences, key=lambda sequence: len(sequence[0]) + len(sequence[1]))
            layout = settle_layout(scorer, trees_of((longest[0], [longest[1]])), torch.float32).layout
            return log_probs(scorer, sequences, layout, BUDGET).reshape(len(rows), -1)

    base = logps(reference)
    sigma = float(np.sqrt(scores.var(axis=1, ddof=1).mean()))
    found = {}
    for name, folder in runs.items():
        summary = json.loads((RunFolder(folder).report() / "summary.json").read_text())
        rho = correlation(logps(str(RunFolder(folder).model())) - base, scores[:, :SAMPLES_PER_QUERY])
        gain = summary["score/policy"] - float(scores.mean())
        found[name] = RewardQuality(rho, rho * sigma * float(np.sqrt(2 * summary["kl/sequence"])), gain)
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> TokenIds:
    """(T,) ids, T >= 1: an empty continuation consists of EOS alone."""
    ids = tokenizer(text, add_special_tokens=False).input_ids or [tokenizer.eos_token_id]
    return np.asarray(ids, dtype=np.int32)
