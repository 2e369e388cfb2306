"""Samples of a model on held-out prompts, and their log-probs."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo import distributed, terminal
from dpo.config import EvaluateConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.records import TokenIds
from dpo.data.trees import Layout, sequence_batch
from dpo.evaluate.sampling import Continuation, sample

KL_SEED_OFFSET = 1  # the KL's samples are not the compared ones


Sequences = list[tuple[TokenIds, TokenIds]]


Float64s = npt.NDArray[np.float64]


def held_out_prompts(
    data: TokenizedDataset, number: int, completion_tokens: int, positions: int | None
) -> list[TokenIds]:
    """The first different prompts of a data set, cut on the left where the continuation needs the room.

    Args:
        data: Held-out groups.
        number: Most prompts.
        completion_tokens: Longest continuation.
        positions: Of the model, or None without a limit.
    """
    room = positions - completion_tokens if positions is not None else None
    found: dict[bytes, TokenIds] = {}
    for index in range(len(data)):
        prompt = np.asarray(data[index].prompt)
        prompt = prompt[-room:] if room is not None and room > 0 else prompt
        found.setdefault(prompt.tobytes(), prompt)
        if len(found) == number:
            break
    return list(found.values())


@dataclass(frozen=True, slots=True)
class Sampler:
    """A model that continues prompts as the options say."""

    model: PreTrainedModel
    options: EvaluateConfig
    eos: int
    _: KW_ONLY
    sharded: bool

    def sample(
        self, prompts: Sequence[TokenIds], progress: str, *, for_kl: bool = False
    ) -> list[Continuation]:
        """One continuation of each prompt; for the KL at temperature 1, and others."""
        drawn = sample(
            self.model,
            prompts,
            num_samples=1,
            max_new_tokens=self.options.completion_tokens,
            temperature=1.0 if for_kl else self.options.temperature,
            seed=self.options.seed + KL_SEED_OFFSET if for_kl else self.options.seed,
            batch_size=self.options.batch_size,
            eos_token_id=self.eos,
            progress=progress,
            sharded=self.sharded,
        )
        return [continuations[0] for continuations in drawn]


def log_probs(scorer: nn.Module, sequences: Sequences, layout: Layout, budget: int) -> Float64s:
    """(N,) summed log-probs in nats of N sequences, computed over the ranks, in order, on every rank.

    Args:
        scorer: A `SequenceScorer`, sharded or not.
        sequences: Prompt and completion of each, in token ids.
        layout: How the scorer takes its batches.
        budget: Most tokens of a batch, padding included.
    """
    width = max(len(prompt) + len(completion) for prompt, completion in sequences)
    size = max(1, budget // width)
    starts = range(0, len(sequences), size)
    mine: dict[int, Float64s] = {}
    turns = distributed.turns_of(starts)  # also an empty batch is a pass that a sharded model's ranks share
    for start in terminal.progress(turns, description="log-probs of samples", unit="batches", leave=False):
        chosen = sequences[start : start + size] if start is not None else []
        with torch.no_grad():
            found = scorer(sequence_batch(chosen, layout).to(distributed.device())).cpu().numpy()
        if start is not None:
            mine[start] = found
    gathered = {start: values for part in distributed.gather_objects(mine) for start, values in part.items()}
    return np.concatenate([gathered[start] for start in starts])


def texts(continuations: Sequence[Continuation], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The continuations as text."""
    return [str(tokenizer.decode(drawn.ids, skip_special_tokens=True)) for drawn in continuations]
