"""Sampling from a causal language model: batched, over all ranks, with results that depend on neither.

Every (prompt, sample) has its own random stream, derived from the seed and the two indices, and batches are
formed without the world size. So the samples depend neither on the batch size nor on the number of ranks (up
to the last bits of a forward pass). A prompt with several samples is computed once for those of a batch.

Two models with the same seed share their randomness: where they agree on the distribution, they draw the same
token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dpo import alive, terminal
from dpo.data.records import TokenIds
from dpo.distributed import device, from_main, gather_objects, turns_of
from dpo.errors import UserError
from dpo.evaluate.generation import (
    COMPARED,
    Together,
    can_share,
    computed_once,
    left_padded,
    own_generation_config,
    together,
)
from dpo.evaluate.noise import ExponentialRace
from dpo.model.attention import restore_attention
from dpo.random_bits import stream_key


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a model generated after a prompt."""

    ids: TokenIds
    """(T,) token ids without the one that ended it; empty if that came first."""
    stop: int | None
    """The token that ended it, EOS or another end of a turn; None if it was cut at the longest length."""

    @property
    def finished(self) -> bool:
        """Whether the model ended it."""
        return self.stop is not None

    def sampled_ids(self) -> TokenIds:
        """(T,) or (T + 1,) int32: every token that was drawn, as log-probs count them."""
        return self.ids if self.stop is None else np.append(self.ids, np.int32(self.stop))


def stop_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a continuation: the tokenizer's EOS first, then those of the model's own settings.

    A chat model ends its turns with a token that need not be the tokenizer's EOS; its generation_config.json
    lists them. Where it goes on, what follows is a turn that it invents.
    """
    settings = getattr(model.generation_config, "eos_token_id", None)
    listed = settings if isinstance(settings, list | tuple) else [] if settings is None else [settings]
    return tuple(dict.fromkeys([int(tokenizer.eos_token_id), *map(int, listed)]))


class _Row(NamedTuple):
    """One sequence to sample, by the index of its prompt and its own among that prompt's samples."""

    prompt: int
    sample: int


def sample(
    model: PreTrainedModel,
    prompts: Sequence[npt.NDArray[np.int32]],
    *,
    num_samples: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    batch_size: int,
    stop_ids: Sequence[int],
    progress: str | None,
    sharded: bool = False,
) -> list[list[Continuation]]:
    """Samples `num_samples` continuations of each prompt from the full distribution: no top-k, no top-p.

    Every rank calls it with the same arguments and a copy of the model, or its part of a sharded one, and
    gets the complete result.

    Args:
        model: A causal language model in evaluation mode, on this rank's device. Its own generation settings
            are ignored, but for `stop_ids`.
        prompts: P arrays of (T_p,) token ids, each with at least one token.
        num_samples: Continuations of each prompt.
        max_new_tokens: Longest continuation, in tokens, the one that ends it included.
        temperature: Divides the logits; 0 takes the most likely token.
        seed: At least 0. A sample's random stream depends only on it, the prompt's index and its own index.
        batch_size: Sequences that are sampled together.
        stop_ids: Tokens that end a continuation, from `stop_ids_of`; the first one is the padding.
        progress: Label of the progress bar on rank 0, or None for no bar.
        sharded: The ranks share one copy of the model, so that all must take part in each pass.

    Returns:
        For each prompt, in order, its `num_samples` continuations.

    Raises:
        UserError: A prompt leaves fewer than `max_new_tokens` of the model's positions.
    """
    _check_lengths(model, prompts, max_new_tokens)
    restore_attention(model)
    rows = [_Row(prompt, number) for prompt in range(len(prompts)) for number in range(num_samples)]
    rows.sort(key=lambda row: len(prompts[row.prompt]))

    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
    )
    drawn: dict[_Row, Continuation] = {}
    few = GenerationConfig(**{**config.to_dict(), "max_new_tokens": min(COMPARED, max_new_tokens)})
    how: Together = "padded"
    shares = False
    if len(rows) > 1:
        with own_generation_config(model, few):
            how = from_main(together(model, prompts, stop_ids[0], sharded=sharded))
            long = [prompt for prompt in prompts if len(prompt) > 1]  # than the token that is not shared
            if num_samples > 1 and how != "alone" and (len(long) == len(prompts) or (long and not sharded)):
                shares = from_main(can_share(model, long, stop_ids[0], how, sharded=sharded))
    batches = turns_of(_batches(rows, [len(prompt) for prompt in prompts], batch_size, how))
    with (
        own_generation_config(model, config),
        terminal.bar(sum(len(batch or ()) for batch in batches), description=progress, unit="samples") as bar,
    ):
        for own in batches:
            if own is None and not sharded:
                break
            alive.step("sampling")
            batch = own or rows[:1]  # other ranks need this pass; a sample that is drawn twice is the same
            keys = [stream_key(seed, row.prompt, row.sample) for row in batch]
            processors = LogitsProcessorList()
            if temperature > 0:
                processors.append(ExponentialRace(keys, temperature, device()))
            asked = [prompts[row.prompt] for row in batch]
            start = {}
            if shares and min(map(len, asked)) > 1:
                start = computed_once(model, asked, stop_ids[0], sharded=sharded)
            ids, mask = left_padded(asked, stop_ids[0])
            output = model.generate(  # type: ignore[operator]
                inputs=ids.to(device()),
                attention_mask=mask.to(device()),
                logits_processor=processors,
                synced_gpus=sharded,
                **start,
            )
            written = output[:, ids.shape[1] :].cpu().numpy().astype(np.int32)
            for row, tokens in zip(batch, written, strict=True):
                drawn[row] = _until_stop(tokens, stop_ids)
            bar.update(len(own or ()))

    complete = {key: value for part in gather_objects(drawn) for key, value in part.items()}
    return [[complete[_Row(prompt, n)] for n in range(num_samples)] for prompt in range(len(prompts))]


def _check_lengths(
    model: PreTrainedModel, prompts: Sequence[npt.NDArray[np.int32]], max_new_tokens: int
) -> None:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, prompts), default=0)
    if positions is not None and longest + max_new_tokens > positions:
        raise UserError(
            f"a prompt of {longest} tokens and a continuation of {max_new_tokens} do not fit the model's "
            f"{positions} positions; sample fewer tokens or shorten the prompts"
        )


def _batches(
    rows: Sequence[_Row], lengths: Sequence[int], batch_size: int, how: Together
) -> list[list[_Row]]:
    """Rows, sorted by length, in batches that the model computes as it computes each row alone.

    Args:
        rows: In the order of their prompts' lengths.
        lengths: Of the prompts.
        batch_size: Most rows of a batch.
        how: Which rows may be in a batch.
    """
    parts = [list(rows)]
    if how != "padded":
        parts = [list(part) for _, part in groupby(rows, key=lambda row: lengths[row.prompt])]
    size = 1 if how == "alone" else batch_size
    return [part[start : start + size] for part in parts for start in range(0, len(part), size)]


def _until_stop(tokens: TokenIds, stop_ids: Sequence[int]) -> Continuation:
    """(T,) generated tokens up to the first that ends a continuation; the rest is padding."""
    ends = np.flatnonzero(np.isin(tokens, stop_ids))
    if len(ends) == 0:
        return Continuation(tokens.copy(), stop=None)
    return Continuation(tokens[: ends[0]].copy(), stop=int(tokens[ends[0]]))
