"""What a prompt was, beside its token ids: its text, and the turns of a chat, for scorers and judges."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo.data.chat import prompt_text
from dpo.data.fields import RowError
from dpo.data.records import Message, PreferenceGroup, TokenIds
from dpo.data.tokenize import encode_prompt


class Asked(NamedTuple):
    """A prompt for people and for other models."""

    text: str
    """As the model reads it, without special tokens."""
    turns: tuple[Message, ...] | None = None
    """The turns of a chat; None for a text, or where they are not known."""

    def messages(self, answer: str) -> list[Message]:
        """The dialogue with an answer; a text is what the user says.

        A last turn of the assistant is the start of the answer, which goes on there.
        """
        turns = [Message(**turn) for turn in self.turns or (Message(role="user", content=self.text),)]
        if turns[-1]["role"] == "assistant":
            turns[-1]["content"] += answer
            return turns
        return [*turns, Message(role="assistant", content=answer)]


def asked_of(
    prompts: Sequence[TokenIds],
    texts: Sequence[str],
    groups: Iterable[PreferenceGroup],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Asked]:
    """Prompts with the turns that they were made of, read again from the data.

    Args:
        prompts: In token ids; an end of a prompt of the data, or all of it.
        texts: Of the prompts.
        groups: The data they come from; read up to the last prompt that is found.
        tokenizer: That they were made with.
    """
    missing = {prompt.tobytes() for prompt in prompts}
    lengths = {len(prompt) for prompt in prompts}
    found: dict[bytes, tuple[Message, ...]] = {}
    for ids, turns in _chats(groups, tokenizer) if tokenizer.chat_template is not None else ():
        for length in lengths:
            key = ids[-length:].tobytes()
            if key in missing and len(ids) >= length:
                found.setdefault(key, turns)
        missing -= found.keys()
        if not missing:
            break
    return [Asked(text, found.get(ids.tobytes())) for ids, text in zip(prompts, texts, strict=True)]


def _chats(
    groups: Iterable[PreferenceGroup], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[TokenIds, tuple[Message, ...]]]:
    """Token ids and turns of the prompts that are chats."""
    for group in groups:
        if isinstance(group.prompt, str):
            continue
        try:
            if group.template_fields or group.continues:
                text = prompt_text(group.prompt, tokenizer, group.template_fields, continues=group.continues)
                ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
            else:
                ids = encode_prompt(group.prompt, tokenizer)
        except RowError:
            continue  # not in the data set either
        yield np.asarray(ids, dtype=np.int32), group.prompt
