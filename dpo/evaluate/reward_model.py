"""A reward model as a scorer: a sequence classifier with one output, read through its chat template.

Each rank has a copy. Scores are kept by content (`score_cache`), under an identity of weights, configuration
and tokenizer, so that a round that is killed and a policy that repeats itself cost nothing twice.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dpo import alive, terminal
from dpo.config import ModelConfig
from dpo.data.chat import dialogue_text
from dpo.data.fields import RowError
from dpo.data.tokenize import tokenizer_digest
from dpo.distributed import device, on_main
from dpo.errors import UserError
from dpo.evaluate.asked import Asked
from dpo.evaluate.classifier import describe_classifier, load_classifier
from dpo.evaluate.score_cache import CACHE, ScoreCache, content_key
from dpo.files import sha256_of
from dpo.model.files import raw_config, weight_files

BATCH = 8
"""Dialogues of a forward pass."""
INERT = ("_name_or_path", "transformers_version", "architectures", "_commit_hash", "use_cache")


class RewardScorer:
    """The one output of a reward model, higher is better; only differences on one prompt mean something.

    Args:
        model: A folder or a hub name with safetensors weights.
        plain: Score prompt and completion as one text, for a model without a chat template.
        cache: Root of the caches of scores.

    Raises:
        UserError: The model is missing, not trained as a reward model, or has no chat template.
    """

    def __init__(self, model: str, *, plain: bool = False, cache: Path = CACHE) -> None:
        self.name = f"{'reward-plain' if plain else 'reward'}:{model}"
        self._plain = plain
        self._tokenizer, loaded, missing = load_classifier(self.name, model, "auto")
        _check(self.name, loaded.config.num_labels, missing, self._tokenizer)
        loaded.config.get_text_config().pad_token_id = self._tokenizer.pad_token_id
        self._tokenizer.padding_side = "right"  # the output is read at the last token that is not padding
        self._tokenizer.truncation_side = "left"  # the answer is what is judged
        positions = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
        self._max_length = min(
            self._tokenizer.model_max_length, positions or self._tokenizer.model_max_length
        )
        self._model = loaded.to(device()).eval()
        self.identity: str | None = on_main(
            lambda: _identity(model, self._tokenizer, str(loaded.dtype), plain)
        )
        self._cache = ScoreCache(self.identity, cache)
        self._said_cut = False

    def score(self, prompts: Sequence[Asked], completions: Sequence[str]) -> list[float]:
        """The reward of each completion after its prompt; what is in the cache is not computed.

        A batch is computed as a whole, since its padding decides on last bits: a run that was killed between
        batches gets the same scores as one that was not.

        Raises:
            UserError: The chat template refuses a dialogue, or a score is not finite.
        """
        texts = [self._text(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        keys = [*map(content_key, texts)]
        if (found := self._cache.find(keys)) is not None:
            return found
        scores = [
            score
            for start in range(0, len(texts), BATCH)
            for score in self._pass(texts[start : start + BATCH])
        ]
        if not all(map(_is_finite, scores)):
            raise UserError(f"scorer {self.name}: a score is not finite; the model may need another dtype")
        self._cache.add(dict(zip(keys, scores, strict=True)))
        found = self._cache.find(keys)
        assert found is not None
        return found

    def is_positive(self, score: float) -> bool:
        """Whether the reward exceeds 0, which depends on how the model was trained."""
        return score > 0

    def _text(self, prompt: Asked, completion: str) -> str:
        if self._plain:
            return prompt.text + completion
        try:
            return dialogue_text(prompt.messages(completion), self._tokenizer)
        except RowError as fault:
            raise UserError(f"scorer {self.name}: {fault}; the prompt begins {prompt.text[:80]!r}") from fault

    @torch.inference_mode()
    def _pass(self, texts: Sequence[str]) -> list[float]:
        alive.step("scoring")
        inputs = self._tokenizer(
            list(texts),
            add_special_tokens=self._plain,
            padding=True,
            truncation=True,
            max_length=self._max_length,
            return_tensors="pt",
        )
        self._say_cut(inputs["attention_mask"])
        logits = self._model(
            input_ids=inputs["input_ids"].to(device()), attention_mask=inputs["attention_mask"].to(device())
        ).logits
        return [float(score) for score in logits[:, 0].float().tolist()]

    def _say_cut(self, mask: torch.Tensor) -> None:
        """Says once that a dialogue may be longer than the model reads."""
        if not self._said_cut and int(mask.sum(1).max()) >= self._max_length:
            self._said_cut = True
            terminal.warning(
                f"scorer {self.name}: a dialogue has {self._max_length} tokens or more, which is all that "
                "the model reads: the start of longer ones is left out"
            )


def plain_reward(model: str) -> RewardScorer:
    """`reward-plain:MODEL`."""
    return RewardScorer(model, plain=True)


def check_reward_model(scorer: str, model: str) -> None:
    """Raises UserError for what is known to be wrong of a reward model before its weights are loaded.

    Args:
        scorer: reward:MODEL or reward-plain:MODEL.
        model: MODEL.
    """
    tokenizer, config = describe_classifier(scorer, model)
    _check(scorer, config.num_labels, [], tokenizer)


def _check(
    scorer: str, num_labels: int | None, missing: list[str], tokenizer: PreTrainedTokenizerBase
) -> None:
    if num_labels != 1 or missing:
        why = f"it lacks {', '.join(missing)}" if missing else f"it has {num_labels} outputs"
        raise UserError(
            f"scorer {scorer}: not a reward model: {why}; expected a sequence-classification model "
            "with one trained output (num_labels 1), or use hf:MODEL for a classifier"
        )
    if tokenizer.chat_template is None and not scorer.startswith("reward-plain:"):
        raise UserError(
            f"scorer {scorer}: the model has no chat template, by which it would read prompt and "
            "answer; give one that has, or reward-plain:MODEL if it was trained on both as one text"
        )


def _is_finite(score: float) -> bool:
    return abs(score) < float("inf")


def _identity(model: str, tokenizer: PreTrainedTokenizerBase, dtype: str, plain: bool) -> str:
    """Hex digest of all that decides a score: weights, configuration, tokenizer and template, dtype."""
    named = ModelConfig(name_or_path=model)
    config = {key: value for key, value in raw_config(named).items() if key not in INERT}
    parts = [
        *(sha256_of(file) for file in weight_files(named)),
        tokenizer_digest(tokenizer),
        json.dumps(config, sort_keys=True),
        dtype,
        str(plain),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
