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

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo.data.chat import ChatText, chat_text, check_template, end_of_turn, prompt_text
from dpo.data.dialogue import ends_with_answer
from dpo.data.fields import RowError
from dpo.data.notes import RowNotes
from dpo.data.records import Message, Pair, PreferenceGroup, TokenIds, TokenizedGroup

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
                yield _fit(*encoded, group, tokenizer, options, counts)
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
        ids = bos + without_bos(ids, bos)
        if ids:
            return ids
        return [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
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
    texts = [group for group in groups if isinstance(group.prompt, str)]
    joint = iter(_encode_batch([f"{g.prompt}{c}" for g in texts for c in g.completions], tokenizer))
    apart = iter(_encode_batch([c for g in texts for c in g.completions], tokenizer))
    bos = bos_prefix(tokenizer)
    ends = tuple(filter(None, (tokenizer.eos_token, end_of_turn(tokenizer) if texts else None)))
    notes.groups += len(groups)
    notes.texts += len(texts) if tokenizer.chat_template is not None else 0
    for group in groups:
        if not isinstance(group.prompt, str):
            check_template(tokenizer, "data.train")
            try:
                chat = chat_text(group, tokenizer, complete=append_eos)
                notes.ignored.update(f"messages.{key}" for key in chat.unused)
                notes.without_system += chat.without_system
                yield _encode_chat(chat, tokenizer)
            except RowError as fault:
                yield fault
            continue
        prompt = encode_prompt(group.prompt, tokenizer)
        plain = without_bos(prompt, bos)
        completions = []
        for text in group.completions:
            together, alone = without_bos(next(joint), bos), next(apart)
            # The ids of the joint text are right for tokenizers that mark word starts. Where the boundary
            # falls inside a token, prompt and completion are encoded apart, as if a policy had continued the
            # prompt's ids.
            fits = group.prompt and together[: len(plain)] == plain and len(together) > len(plain)
            ids = together[len(plain) :] if fits else alone
            if append_eos and ids[-1:] != [tokenizer.eos_token_id] and not text.rstrip().endswith(ends):
                ids = [*ids, tokenizer.eos_token_id]
            completions.append(ids)
        yield prompt, completions


def _encode_batch(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not texts:
        return []
    return list(tokenizer(texts, add_special_tokens=False, verbose=False).input_ids)


def _encode_chat(text: ChatText, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[list[int]]]:
    """Ids of the prompt and of what follows it in each dialogue.

    Where the first characters of a completion merge with the end of the prompt into one token, the two are
    encoded apart, as in plain text: the policy answers the prompt's own ids.
    """
    prompt, *dialogues = _encode_batch([text.prompt, *text.dialogues], tokenizer)
    completions = []
    for whole, written in zip(dialogues, text.dialogues, strict=True):
        fits = whole[: len(prompt)] == prompt and len(whole) > len(prompt)
        completions.append(
            whole[len(prompt) :] if fits else _encode_batch([written[len(text.prompt) :]], tokenizer)[0]
        )
    return prompt, completions


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
    kept = tuple(pair for pair in source.pairs if completions[pair.chosen] != completions[pair.rejected])
    counts["dropped/pairs_identical_in_tokens"] += len(source.pairs) - len(kept)
    if any(not ids for ids in completions) or not kept:
        raise RowError(
            "nothing_left_after_tokenization", "no pair has two different completions in token ids"
        )
    group = _without_unused(np.asarray(prompt, dtype=np.int32), completions, kept, source.scores)
    counts["dropped/pairs_repeated"] += len(kept) - len(group.pairs)
    return group


def _without_unused(
    prompt: TokenIds,
    completions: list[list[int]],
    pairs: tuple[Pair, ...],
    scores: tuple[float, ...] | None,
) -> TokenizedGroup:
    """Keeps each distinct completion that some pair names, once: nothing is computed for the others."""
    position: dict[tuple[int, ...], int] = {}
    for index in sorted({index for pair in pairs for index in pair}):
        position.setdefault(tuple(completions[index]), len(position))
    margins: dict[Pair, float] = {}  # of pairs that became equal the first counts
    for chosen, rejected in pairs:
        renamed = Pair(position[tuple(completions[chosen])], position[tuple(completions[rejected])])
        margins.setdefault(renamed, scores[chosen] - scores[rejected] if scores else 0.0)
    return TokenizedGroup(
        prompt=prompt,
        completions=tuple(np.asarray(ids, dtype=np.int32) for ids in position),
        pairs=tuple(margins),
        margins=tuple(margins.values()) if scores else None,
    )
