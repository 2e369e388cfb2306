"""Text groups -> groups of token ids: chat template, BOS and EOS, the prompt's boundary, truncation.

Guarantees: a prompt has the same ids for all of its completions and is never empty (the first completion
token needs a predictor); a truncated completion never ends with EOS; what is dropped is counted by reason.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo.data.chat import TODAY, Piece, chat_text, check_template, end_of_turn, knows_field, prompt_text
from dpo.data.dialogue import ends_with_answer
from dpo.data.distinct import split_pairs, telling_pairs, without_unused
from dpo.data.fields import RowError
from dpo.data.notes import RowNotes
from dpo.data.records import Message, PreferenceGroup, TokenizedGroup

FEW_REFERENCE_SCORES = "prompts_with_few_reference_scores"
"""In counts: how many prompts have too few scores of the reference for quantiles."""
ENOUGH_REFERENCE_SCORES = 8
GROUPS_PER_CALL = 512  # the fast tokenizers work in parallel inside one call


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeOptions:
    """What decides the ids of a group besides the tokenizer and the text; lengths in tokens."""

    max_length: int
    """Longest prompt + completion."""
    max_prompt_length: int | None
    """Longest prompt; None: what the longest completion leaves, and at least half of max_length."""
    drop_too_long: bool
    """Drop a group that does not fit instead of truncating it."""
    append_eos: bool
    """Completions are complete: end them with EOS, or with what the chat template writes after an answer."""
    group_pairs: bool = True
    """Keep all pairs of a prompt in one group; otherwise every pair is a group of its own."""


def tokenize_groups(
    groups: Iterable[PreferenceGroup],
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    counts: Counter[str],
    notes: RowNotes,
) -> Iterator[TokenizedGroup]:
    """Tokenizes a stream of groups, in order.

    Args:
        groups: Text groups; prompts as text or as chat turns.
        tokenizer: The policy's tokenizer; needs a chat template for chat turns.
        options: Lengths and EOS.
        counts: Receives the number of dropped pairs by reason (`dropped/...`), and of truncated prompts and
            completions (`truncated/...`).
        notes: Receives dropped groups by reason, with the first of each.

    Raises:
        UserError: Chat turns and a tokenizer without a chat template.
    """
    stream = iter(groups)
    while chunk := list(islice(stream, GROUPS_PER_CALL)):
        for group, encoded in zip(chunk, _encode(chunk, tokenizer, options.append_eos, notes), strict=True):
            try:
                if isinstance(encoded, RowError):
                    raise encoded
                fitting = _fit(*encoded, group, tokenizer, options, counts)
                yield from [fitting] if options.group_pairs else split_pairs(fitting)
            except RowError as fault:
                notes.dropped_groups += 1
                notes.drop(
                    fault.reason, f"{group.place or 'a row'}: {fault}; the prompt ends {_end_of(group)}"
                )


def _end_of(group: PreferenceGroup) -> str:
    prompt = group.prompt if isinstance(group.prompt, str) else group.prompt[-1]["content"]
    return repr(prompt[-40:])


def encode_prompt(
    prompt: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase, *, key: str = "data.train"
) -> list[int]:
    """The ids of a prompt, at least one.

    Args:
        prompt: Text, which starts with BOS once if the tokenizer adds BOS to texts, and is BOS or EOS alone
            if there is nothing else; or chat turns, for which the chat template decides. A last turn of the
            assistant is left open.
        tokenizer: The policy's tokenizer; needs a chat template for chat turns.
        key: The option that the prompt belongs to, for messages.

    Raises:
        UserError: Chat turns and a tokenizer without a chat template.
        RowError: The template refuses the turns.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids)
        bos = bos_prefix(tokenizer)
        return bos + without_bos(ids, bos) or _first_predictor(tokenizer)
    check_template(tokenizer, key)
    text = prompt_text(prompt, tokenizer, {}, continues=ends_with_answer(prompt))
    return _encode_batch([text], tokenizer)[0]


def bos_prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer starts every text with it, else []."""
    first = list(tokenizer("", add_special_tokens=True).input_ids)[:1]
    return first if first == [tokenizer.bos_token_id] else []


def without_bos(ids: list[int], bos: list[int]) -> list[int]:
    """The ids of a text whose own first token may be the BOS that the tokenizer adds."""
    return ids[1:] if bos and ids[:1] == bos else ids


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of everything in the tokenizer that decides ids; tokenized data is named by it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = sorted(tokenizer.get_vocab().items())
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, bos_prefix(tokenizer), tokenizer.chat_template)
    return hashlib.sha256(json.dumps([type(tokenizer).__name__, content, special]).encode()).hexdigest()


def _encode(
    groups: Sequence[PreferenceGroup], tokenizer: PreTrainedTokenizerBase, append_eos: bool, notes: RowNotes
) -> Iterator[tuple[list[int], list[list[int]]] | RowError]:
    """Prompt ids and completion ids of each group, or why it is dropped."""
    texts = [_written(group, tokenizer, append_eos, notes) for group in groups]
    encoded = iter(_encode_texts([text for text in texts if not isinstance(text, RowError)], tokenizer))
    ends = tuple(filter(None, (tokenizer.eos_token, end_of_turn(tokenizer))))
    for group, text in zip(groups, texts, strict=True):
        if isinstance(text, RowError):
            yield text
            continue
        prompt, completions = next(encoded)
        if group.conversations:
            try:
                completions = _marked(completions, text.pieces, tokenizer)
            except RowError as fault:
                yield fault
                continue
        if isinstance(group.prompt, str) and append_eos:  # a chat template ends the turn itself
            for written, ids in zip(group.completions, completions, strict=True):
                if ids[-1:] != [tokenizer.eos_token_id] and not written.rstrip().endswith(ends):
                    ids.append(tokenizer.eos_token_id)
        yield prompt, completions


class _Written(NamedTuple):
    """A group as texts."""

    prompt: str
    wholes: Sequence[str]
    """The prompt with each completion."""
    bos: list[int]
    """What stands before them in token ids, and is not in the text: a chat template writes its own."""
    pieces: Sequence[Sequence[Piece]] = ()
    """The parts of each completion, where it may have several messages."""


def _written(
    group: PreferenceGroup, tokenizer: PreTrainedTokenizerBase, complete: bool, notes: RowNotes
) -> _Written | RowError:
    notes.groups += 1
    if isinstance(group.prompt, str):
        notes.texts += tokenizer.chat_template is not None
        wholes = [f"{group.prompt}{completion}" for completion in group.completions]
        return _Written(group.prompt, wholes, bos_prefix(tokenizer))
    check_template(tokenizer, "data.train")
    try:
        chat = chat_text(group, tokenizer, complete=complete)
    except RowError as fault:
        return fault
    notes.ignored.update(f"messages.{key}" for key in chat.unused)
    notes.without_system += chat.without_system
    notes.dated = notes.dated or (f"{TODAY:%d %B %Y}" if knows_field(tokenizer, "strftime_now") else "")
    return _Written(chat.prompt, chat.dialogues, [], chat.pieces)


def _encode_texts(
    texts: Sequence[_Written], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Prompt ids and completion ids of each text.

    The ids of prompt and completion together are right for tokenizers that mark word starts. Where the
    boundary falls inside a token, the completion is encoded apart, as if a policy had continued the prompt's
    ids.
    """
    alone = _encode_batch([text.prompt for text in texts], tokenizer)
    joint = iter(_encode_batch([whole for text in texts for whole in text.wholes], tokenizer))
    prompts = [without_bos(ids, text.bos) for text, ids in zip(texts, alone, strict=True)]
    found: list[list[list[int] | None]] = []
    for text, prompt in zip(texts, prompts, strict=True):
        together = [without_bos(next(joint), text.bos) for _ in text.wholes]
        fits = [prompt and ids[: len(prompt)] == prompt and len(ids) > len(prompt) for ids in together]
        found.append([ids[len(prompt) :] if fit else None for ids, fit in zip(together, fits, strict=True)])
    missing = [
        whole[len(text.prompt) :]
        for text, all_ids in zip(texts, found, strict=True)
        for whole, ids in zip(text.wholes, all_ids, strict=True)
        if ids is None
    ]
    apart = iter(_encode_batch(missing, tokenizer))
    for text, prompt, all_ids in zip(texts, prompts, found, strict=True):
        completions = [next(apart) if ids is None else ids for ids in all_ids]
        yield text.bos + prompt or _first_predictor(tokenizer), completions


def _marked(
    completions: list[list[int]], pieces: Sequence[Sequence[Piece]], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """Completions in which what the assistant did not write is marked as read alone; see `TokenIds`.

    Raises:
        RowError: A token reaches over the end of a message.
    """
    found = []
    for ids, parts in zip(completions, pieces, strict=True):
        apart = _encode_batch([part.text for part in parts], tokenizer)
        if [one for of_part in apart for one in of_part] != ids:
            raise RowError(
                "template_merges_messages", "a token holds the end of a message and the start of the next one"
            )
        marked = zip(parts, apart, strict=True)
        found.append([one if part.is_trained else ~one for part, of_part in marked for one in of_part])
    return found


def _first_predictor(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The prompt where there is none: the first token of a completion needs something that predicts it."""
    return [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]


def _encode_batch(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    return list(tokenizer(texts, add_special_tokens=False, verbose=False).input_ids)


def _fit(
    prompt: list[int],
    completions: list[list[int]],
    source: PreferenceGroup,
    tokenizer: PreTrainedTokenizerBase,
    options: TokenizeOptions,
    counts: Counter[str],
) -> TokenizedGroup:
    """Truncates or drops what is too long; drops pairs that became identical. RowError if nothing is left."""
    longest = max(map(len, completions))
    limit = options.max_prompt_length or max(options.max_length - longest, options.max_length // 2)
    room = options.max_length - min(len(prompt), limit)
    if len(prompt) > limit or longest > room:
        if options.drop_too_long:
            raise RowError(
                "too_long", f"{len(prompt)} + {longest} tokens; data.too_long is drop, and they do not fit"
            )
        if len(prompt) > limit:
            counts["truncated/prompts"] += 1
            bos = bos_prefix(tokenizer) if prompt[:1] == bos_prefix(tokenizer) and limit > 1 else []
            prompt = bos + prompt[len(prompt) - limit + len(bos) :]
        counts["truncated/completions"] += sum(len(ids) > room for ids in completions)
        completions = [ids[:room] for ids in completions]
    kept = telling_pairs(source.pairs, completions)
    counts["dropped/pairs_identical_in_tokens"] += len(source.pairs) - len(kept)
    if any(not any(one >= 0 for one in ids) for ids in completions) or not kept:
        raise RowError(
            "nothing_left_after_tokenization",
            "no pair has two different completions in token ids, and no label is left",
        )
    group = without_unused(
        np.asarray(prompt, dtype=np.int32), completions, kept, source.scores, source.reference_scores
    )
    num_scores = len(source.reference_scores or source.scores or ())
    if 0 < num_scores < ENOUGH_REFERENCE_SCORES:
        counts[FEW_REFERENCE_SCORES] += 1
    counts["dropped/pairs_repeated"] += len(kept) - len(group.pairs)
    return group
