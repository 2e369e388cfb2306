"""Scorers of text: how positive a continuation is, by a lexicon (vader) or by a classifier (hf:MODEL).

Reward models are in `reward_model`, what users bring in `own_scorers`.

A scorer gives one number per text, higher is better, and decides which scores count as positive. Scores do
not depend on the number of ranks.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from dpo.config import SCORER_NAMES, EvaluateConfig
from dpo.distributed import device, gather_objects, share_of
from dpo.errors import UserError
from dpo.evaluate.asked import Asked
from dpo.evaluate.classifier import describe_classifier, load_classifier
from dpo.evaluate.own_scorers import CommandScorer, FunctionScorer
from dpo.evaluate.reward_model import RewardScorer, check_reward_model, plain_reward

CLASSIFIER_BATCH = 64


class Scorer(Protocol):
    """One number per text, higher is better."""

    name: str
    """As in evaluate.scorer: vader, hf:MODEL, reward:MODEL, python:module.function or command:PROGRAM."""
    identity: str | None
    """Hex digest of what decides its scores; None where only its name is known."""

    def score(self, prompts: Sequence[Asked], completions: Sequence[str]) -> list[float]:
        """The score of each completion, whose prompt has the same index."""

    def is_positive(self, score: float) -> bool:
        """Whether a text with this score counts as positive."""


class VaderScorer:
    """The compound sentiment of the vader lexicon, in [-1, 1]; positive above 0.05, as its authors advise."""

    name = "vader"
    identity: str | None = None

    def __init__(self) -> None:
        self._analyzer = SentimentIntensityAnalyzer()

    def score(self, prompts: Sequence[Asked], completions: Sequence[str]) -> list[float]:
        """The compound score of each completion alone, in [-1, 1]."""
        return [float(self._analyzer.polarity_scores(text)["compound"]) for text in completions]

    def is_positive(self, score: float) -> bool:
        """Whether the compound exceeds 0.05."""
        return score > 0.05


class ClassifierScorer:
    """P(positive) by a transformers text classifier, in [0, 1]; positive above 0.5.

    Args:
        model: A folder or a hub name with safetensors weights. The positive class is the label named
            positive or pos (in any case), or LABEL_1 of two.

    Raises:
        UserError: The model is missing, has no safetensors, no trained classifier or no positive label.
    """

    def __init__(self, model: str) -> None:
        self.name = f"hf:{model}"
        self.identity: str | None = None
        self._tokenizer, loaded, missing = load_classifier(self.name, model, torch.float32)
        if missing:
            raise UserError(
                f"scorer {self.name}: {model} is not a trained classifier: it lacks "
                f"{', '.join(missing)}; expected a text-classification model"
            )
        config = loaded.config
        self._positive = _positive_class(config.id2label, self.name)
        # A tokenizer without a limit has 1e30 here. RoBERTa counts its positions from 2.
        positions = getattr(config, "max_position_embeddings", 512) - 2
        self._max_length = min(self._tokenizer.model_max_length, positions)
        self._model = loaded.to(device()).eval()

    @torch.inference_mode()
    def score(self, prompts: Sequence[Asked], completions: Sequence[str]) -> list[float]:
        """P(positive) of each completion alone; of one that is too long, only the start is read."""
        scores: list[float] = []
        for start in range(0, len(completions), CLASSIFIER_BATCH):
            inputs = self._tokenizer(
                list(completions[start : start + CLASSIFIER_BATCH]),
                padding=True,
                truncation=True,
                max_length=self._max_length,
                return_tensors="pt",
            ).to(device())
            probabilities = self._model(**inputs).logits.float().softmax(dim=-1)
            scores.extend(probabilities[:, self._positive].tolist())
        return scores

    def is_positive(self, score: float) -> bool:
        """Whether P(positive) exceeds 0.5."""
        return score > 0.5


def load_scorer(name: str) -> Scorer:
    """The scorer named `name`, as in `evaluate.scorer`.

    Raises:
        UserError: An unknown name, a classifier that cannot be loaded or has no positive class, or a function
            that does not exist.
    """
    kind, _, argument = name.partition(":")
    if name == "vader":
        return VaderScorer()
    if kind in SCORERS and argument:
        return SCORERS[kind](argument)
    raise UserError(f"scorer: {name}; expected {SCORER_NAMES}")


def check_scorer(options: EvaluateConfig) -> None:
    """Raises UserError for what is known to be wrong of `evaluate.scorer` before any weights are loaded.

    Sampling, which comes before scoring, may take hours.
    """
    if options.scorer is None or not options.num_prompts:
        return
    name = options.scorer
    kind, _, argument = name.partition(":")
    if kind == "hf" and argument:
        _positive_class(describe_classifier(name, argument)[1].id2label or {}, name)
    elif kind.startswith("reward") and argument:
        check_reward_model(name, argument)
    else:
        load_scorer(name)


SCORERS: dict[str, Callable[[str], Scorer]] = {
    "hf": ClassifierScorer,
    "reward": RewardScorer,
    "reward-plain": plain_reward,
    "python": FunctionScorer,
    "command": CommandScorer,
}
"""What stands before the colon -> the scorer of what stands behind it."""


def score_over_ranks(scorer: Scorer, prompts: Sequence[Asked], completions: Sequence[str]) -> list[float]:
    """Scores of all completions, in order, on every rank; each rank scores its share.

    Batches are formed before they are divided among the ranks, so that a classifier's scores do not depend on
    the world size.
    """
    starts = range(0, len(completions), CLASSIFIER_BATCH)
    batches = {start: slice(start, start + CLASSIFIER_BATCH) for start in share_of(starts)}
    mine = {start: scorer.score(prompts[part], completions[part]) for start, part in batches.items()}
    scored = {start: scores for part in gather_objects(mine) for start, scores in part.items()}
    return [score for start in starts for score in scored[start]]


def _positive_class(id2label: Mapping[Any, str], scorer: str) -> int:
    named = [index for index, label in id2label.items() if label.lower() in ("positive", "pos")]
    if not named and len(id2label) == 2:
        named = [index for index, label in id2label.items() if label.lower() == "label_1"]
    if len(named) != 1:
        raise UserError(
            f"scorer {scorer}: no single positive class among the labels {', '.join(id2label.values())}; "
            "expected one named POSITIVE or pos, or LABEL_0 and LABEL_1"
        )
    return int(named[0])
