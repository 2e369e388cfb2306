"""Samples of two models on the same held-out prompts: drawing them, their log-probs, and how they compare.

The caller has one model in memory at a time and passes it in. Both models continue the same prompts with the
same seeds; the KL has samples of its own, at temperature 1. Nothing here depends on the number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import alive, distributed, terminal
from dpo.config import EvaluateConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.records import TokenIds
from dpo.data.trees import Layout, sequence_batch
from dpo.evaluate.asked import Asked
from dpo.evaluate.checks import check_room
from dpo.evaluate.judge import Judge, Judged, judge_all, judged_summary
from dpo.evaluate.sampling import Continuation, sample
from dpo.evaluate.scoring import load_scorer, score_over_ranks
from dpo.evaluate.statistics import distinct_n, mean_interval, repetition, share_by_cluster, win_rate

KL_SEED_OFFSET = 1
"""Added to the seed for the samples of the KL, which are not the compared ones."""

Float64s = npt.NDArray[np.float64]
PromptAndCompletion = tuple[TokenIds, TokenIds]


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """One continuation of each of P held-out prompts by each model."""

    prompts: Sequence[TokenIds]
    reference: Sequence[Continuation]
    policy: Sequence[Continuation]
    seed: int
    """The same for both models."""
    kl: dict[str, float]
    """`kl_summary` of other samples by the policy, at temperature 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedSamples:
    """The samples as text, their scores and what follows from them."""

    seed: int
    asked: list[Asked]
    """The prompts."""
    scorer_identity: str | None
    """Of the scorer, where it has one."""
    reference: list[str]
    policy: list[str]
    reference_scores: list[float] | None
    """(P,); None without a scorer."""
    policy_scores: list[float] | None
    summary: dict[str, float]
    """Under the names of summary.json, with intervals."""
    judged: Sequence[Judged] = ()
    """Verdicts on each prompt; empty without a judge."""

    @property
    def prompts(self) -> list[str]:
        """The prompts as text."""
        return [one.text for one in self.asked]


def held_out_prompts(
    data: TokenizedDataset, number: int, completion_tokens: int, positions: int | None
) -> list[TokenIds]:
    """The first distinct prompts of a data set, cut on the left where the continuation needs the room.

    Args:
        data: Held-out groups.
        number: Most prompts to return.
        completion_tokens: Longest continuation.
        positions: Positions of the model, or None if it has no limit.

    Raises:
        UserError: A continuation leaves no room for a prompt.
    """
    check_room(completion_tokens, positions)
    room = positions - completion_tokens if positions is not None else None
    found: dict[bytes, TokenIds] = {}
    for index in range(len(data)):
        prompt = np.asarray(data[index].prompt)
        prompt = prompt[-room:] if room is not None else prompt
        found.setdefault(prompt.tobytes(), prompt)
        if len(found) == number:
            break
    return list(found.values())


def continue_prompts(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    options: EvaluateConfig,
    *,
    stop_ids: Sequence[int],
    sharded: bool,
    progress: str | None,
    for_kl: bool = False,
) -> list[Continuation]:
    """One continuation of each prompt. All ranks must call it.

    Args:
        model: The whole model or this rank's part of it, in evaluation mode.
        prompts: P prompts in token ids.
        options: Length, temperature, seed and batch size.
        stop_ids: As in `sample`; the same for models that are compared.
        sharded: As in `sample`.
        progress: Label of the progress bar, or None for no bar.
        for_kl: Draw at temperature 1 and with another seed, as the KL needs it.
    """
    drawn = sample(
        model,
        prompts,
        num_samples=1,
        max_new_tokens=options.completion_tokens,
        temperature=1.0 if for_kl else options.temperature,
        seed=options.seed + KL_SEED_OFFSET if for_kl else options.seed,
        batch_size=options.batch_size,
        stop_ids=stop_ids,
        progress=progress,
        sharded=sharded,
    )
    return [continuations[0] for continuations in drawn]


def log_probs(
    scorer: nn.Module, sequences: Sequence[PromptAndCompletion], layout: Layout, budget: int
) -> Float64s:
    """(N,) summed log-probs in nats of N completions, computed over the ranks, in order, on every rank.

    Args:
        scorer: A `SequenceScorer`, sharded or not.
        sequences: Prompt and completion of each, in token ids.
        layout: The batch layout that the scorer takes.
        budget: Most tokens of a batch, padding included.
    """
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    size = max(1, budget // width)
    starts = range(0, len(sequences), size)
    mine: dict[int, Float64s] = {}
    # A rank without a batch still runs a pass: a sharded model needs all ranks in each one.
    turns = distributed.turns_of(starts)
    for start in terminal.progress(turns, description="log-probs of samples", unit="batches", leave=False):
        alive.step("log-probs of samples")
        chosen = sequences[start : start + size] if start is not None else []
        with torch.no_grad():
            found = scorer(sequence_batch(chosen, layout).to(distributed.device())).cpu().numpy()
        if start is not None:
            mine[start] = found
    gathered = {start: values for part in distributed.gather_objects(mine) for start, values in part.items()}
    return np.concatenate([gathered[start] for start in starts])


def compare(
    samples: Samples,
    asked: Sequence[Asked],
    scorer: str | None,
    tokenizer: PreTrainedTokenizerBase,
    judge: Judge | None = None,
) -> ComparedSamples:
    """Scores both models' samples, spread over the ranks. All ranks must call it.

    Args:
        samples: At least one prompt.
        asked: Their prompts, for scorers.
        scorer: Name of the scorer, as in `evaluate.scorer`; None to compare without scores.
        tokenizer: The policy's.
        judge: Compares both models' samples too, on the main process; None: no judge.

    Returns:
        Texts, scores, and a summary: `score/*`, `positive_share/*` and `win_rate` where there is a scorer;
        `judge/*` where there is a judge;
        the KL, `distinct_2/*`, `distinct_texts/*`, `repetition/*`, `sample_tokens/*` and the number of
        prompts, `samples/num_prompts`, in any case.

    Raises:
        UserError: The scorer cannot be loaded.
    """
    drawn = {"reference": samples.reference, "policy": samples.policy}
    both = {name: texts_of([one.ids for one in several], tokenizer) for name, several in drawn.items()}
    scored = _scored(asked, both, scorer) if scorer is not None else _Scored({}, {}, None)
    scores, summary = scored.scores, scored.summary
    summary |= samples.kl | {"samples/num_prompts": float(len(asked))}
    for name, texts in both.items():
        words = [text.split() for text in texts]
        lengths = [len(continuation.ids) for continuation in drawn[name]]
        summary[f"distinct_2/{name}"] = distinct_n(words, 2)
        summary[f"distinct_texts/{name}"] = len(set(texts)) / len(texts)
        summary |= mean_interval(lengths, np.arange(len(lengths))).under(f"sample_tokens/{name}")
        summary[f"repetition/{name}"] = repetition(words, 2)
    judged = (
        distributed.on_main(lambda: judge_all(judge, asked, both["reference"], both["policy"]))
        if judge
        else []
    )
    return ComparedSamples(
        seed=samples.seed,
        asked=[*asked],
        scorer_identity=scored.identity,
        reference=both["reference"],
        policy=both["policy"],
        reference_scores=scores.get("reference"),
        policy_scores=scores.get("policy"),
        summary=summary | (judged_summary(judged) if judged else {}),
        judged=judged,
    )


def texts_of(sequences: Sequence[TokenIds], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Token ids as text, without special tokens; what they part, such as the turns of a chat, has lines."""
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
    return [_text_of(np.asarray(ids), special, tokenizer) for ids in sequences]


def _text_of(ids: TokenIds, special: set[int], tokenizer: PreTrainedTokenizerBase) -> str:
    is_text = np.array([number not in special for number in ids.tolist()], dtype=bool)
    edges = np.flatnonzero(np.diff(is_text)) + 1
    parts = [part for part in np.split(np.arange(len(ids)), edges) if len(part) and is_text[part[0]]]
    texts = [str(tokenizer.decode(ids[part])) for part in parts]
    if len(texts) < 2:
        return "".join(texts)
    return "\n".join(text.strip("\n") for text in texts if text.strip())


class _Scored(NamedTuple):
    scores: dict[str, list[float]]
    """Model -> scores of its texts."""
    summary: dict[str, float]
    """The metrics that follow from them."""
    identity: str | None
    """Of the scorer."""


def _scored(prompts: Sequence[Asked], both: dict[str, list[str]], name: str) -> _Scored:
    scorer = load_scorer(name)
    scores = {model: score_over_ranks(scorer, prompts, texts) for model, texts in both.items()}
    clusters = np.arange(len(both["policy"]))
    summary: dict[str, float] = {}
    for model, values in scores.items():
        positive = [float(scorer.is_positive(value)) for value in values]
        summary |= mean_interval(values, clusters).under(f"score/{model}")
        summary |= share_by_cluster(positive, clusters).under(f"positive_share/{model}")
    summary |= win_rate(scores["policy"], scores["reference"], clusters).under("win_rate")
    return _Scored(scores, summary, scorer.identity)
