"""Chat turns -> text through the tokenizer's chat template, which decides on BOS and the end of a turn.

Guarantees: the text of a prompt is the start of the text of each dialogue with it; the template knows all
that a group holds, and every completion is seen in its dialogue as it was written. Otherwise `RowError`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from itertools import zip_longest
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from dpo.data.fields import RowError, brief
from dpo.data.messages import REASONING_FIELDS
from dpo.data.records import Message, PreferenceGroup
from dpo.errors import UserError

SYSTEM_ROLES = ("system", "developer")
TODAY = date(2024, 7, 26)
"""What a template that asks for the date gets, whenever it is asked: ids must not depend on the day. The
date that Llama 3.1's template has where nobody gives one."""
IDENTIFIERS = ("name", "tool_call_id")
"""Message fields that most templates leave out, since the turns alone say who speaks."""


class Piece(NamedTuple):
    """A part of a completion of several messages."""

    text: str
    is_trained: bool
    """Whether the assistant wrote it; other messages, and the starts of turns, are read alone."""


class ChatText(NamedTuple):
    """A group through the template."""

    prompt: str
    """The turns before the completion, and the start of the assistant's turn."""
    dialogues: list[str]
    """The prompt with each completion."""
    unused: tuple[str, ...]
    """Names and identifiers of the messages that the template leaves out."""
    without_system: bool
    """Whether the template leaves out a system turn."""
    pieces: list[list[Piece]]
    """The parts of each completion, the prompt's text before them."""


def check_template(tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """Raises UserError if the tokenizer has no chat template; `key` is the option that holds the prompts."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{key}: the prompts are chat messages and the tokenizer has no chat template; use a tokenizer "
            "that has one, or prepare the data as text (python -m data_prep hh --format text, for example)"
        )


def prompt_text(
    turns: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template_fields: Mapping[str, Any],
    *,
    continues: bool,
) -> str:
    """The turns as text, followed by the start of the assistant's turn.

    Args:
        turns: The turns before the completion.
        tokenizer: Has a chat template.
        template_fields: What the template gets besides the turns.
        continues: The last turn is that start, and is left open.

    Raises:
        RowError: The template refuses the turns.
    """
    start = {"continue_final_message": True} if continues else {"add_generation_prompt": True}
    return _rendered(turns, tokenizer, template_fields, **start)


def chat_text(
    group: PreferenceGroup, tokenizer: PreTrainedTokenizerBase, *, complete: bool = True
) -> ChatText:
    """The texts of a group whose prompt is chat turns.

    Args:
        group: Its prompt is messages.
        tokenizer: Has a chat template.
        complete: Whether completions end where their author ended; a fragment is not followed by what the
            template writes at the end of a turn.

    Raises:
        RowError: The template refuses the turns, does not know a field of them, rewrites the prompt when a
            completion follows, or leaves out a part of a completion.
    """
    assert not isinstance(group.prompt, str)
    _check_fields(group, tokenizer)
    prompt = prompt_text(group.prompt, tokenizer, group.template_fields, continues=group.continues)
    completions = group.conversations or [(answer,) for answer in _answers(group)]
    pieces = [_pieces(group, messages, prompt, tokenizer, complete=complete) for messages in completions]
    systems = [turn["content"] for turn in group.prompt if turn["role"] in SYSTEM_ROLES]
    written = _squeezed(prompt) if systems else ""
    return ChatText(
        prompt=prompt,
        dialogues=[prompt + "".join(piece.text for piece in of_one) for of_one in pieces],
        unused=tuple(_unused_identifiers(group, tokenizer, prompt)),
        without_system=not all(_squeezed(system) in written for system in systems),
        pieces=pieces,
    )


def _pieces(
    group: PreferenceGroup,
    messages: Sequence[Message],
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    complete: bool,
) -> list[Piece]:
    """The text of each message of the assistant, and between them that of the messages which it reads."""
    turns = [turn for turn in group.prompt if not isinstance(turn, str)]
    done = prompt
    found: list[Piece] = []
    for message, following in zip_longest(messages, messages[1:]):
        if group.continues:
            *_, start = turns
            turns[-1] = Message(**{**start, **message, "content": start["content"] + message["content"]})
        else:
            turns.append(message)
        is_answer = message["role"] == "assistant"
        if not is_answer and following["role"] != "assistant":
            continue  # the answers of two tools, for example
        options = {"continue_final_message": not (complete or following)} if is_answer else {}
        text = _rendered(
            turns, tokenizer, group.template_fields, **options, add_generation_prompt=not is_answer
        )
        if not text.startswith(done):
            raise RowError(
                "template_rewrites_history",
                "the chat template writes the prompt in another way when a completion follows",
            )
        found.append(Piece(text[len(done) :], is_answer))
        if is_answer:
            _check_survives(message, found[-1].text)
        done = text
    return found


def dialogue_text(turns: Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> str:
    """A whole dialogue as text. Raises RowError if the template refuses the turns."""
    return _rendered(turns, tokenizer, {})


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The special token that the chat template writes after an answer; None without such a template."""
    if tokenizer.chat_template is None:
        return None
    turns = [Message(role="user", content="a"), Message(role="assistant", content="b")]
    try:
        whole = _rendered(turns, tokenizer, {})
        rest = whole[len(_rendered(turns, tokenizer, {}, continue_final_message=True)) :]
    except RowError:
        return None
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return max((token for token in special if rest.startswith(token)), key=len, default=None)


def _answers(group: PreferenceGroup) -> list[Message]:
    fields = group.message_fields or ({},) * len(group.completions)
    return [
        Message(role="assistant", content=text, **others)  # type: ignore[typeddict-item]
        for text, others in zip(group.completions, fields, strict=True)
    ]


def _rendered(
    turns: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    template_fields: Mapping[str, Any],
    **options: bool,
) -> str:
    render: Any = tokenizer.apply_chat_template
    template = _without_today(tokenizer.get_chat_template(tools=template_fields.get("tools")))
    arguments = {"tokenize": False, "chat_template": template, **options, **template_fields}
    try:
        return str(render([dict(turn) for turn in turns], **arguments))
    except (TemplateError, TypeError, ValueError) as error:
        # many templates refuse a system turn or turns that do not alternate, or fail on other types
        what = f"the chat template refuses these turns: {error}"
        raise RowError("template_refuses_dialogue", what) from error


def _without_today(template: str) -> str:
    """The template with `TODAY` where it asks for the date; transformers takes no other clock."""
    return re.sub(
        r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(TODAY.strftime(call[2])), template
    )


def _check_fields(group: PreferenceGroup, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises RowError for a field that the template never names: the group would be trained without it."""
    used = {*group.template_fields, *(key for others in group.message_fields for key in others)}
    turns = [*group.prompt, *(turn for messages in group.conversations for turn in messages)]
    used |= {key for turn in turns if not isinstance(turn, str) for key in turn}
    for key in sorted(used - {"role", "content", *IDENTIFIERS}):
        if not knows_field(tokenizer, key):
            raise RowError("template_lacks_field", f"the chat template of this tokenizer has no {key!r}")


def _unused_identifiers(
    group: PreferenceGroup, tokenizer: PreTrainedTokenizerBase, prompt: str
) -> Iterator[str]:
    """Fields that name a speaker or a call, and that change nothing in the text of the prompt."""
    turns = [turn for turn in group.prompt if not isinstance(turn, str)]
    for key in IDENTIFIERS:
        if any(key in turn for turn in turns):
            without: Any = [{n: value for n, value in turn.items() if n != key} for turn in turns]
            if prompt_text(without, tokenizer, group.template_fields, continues=group.continues) == prompt:
                yield key


def knows_field(tokenizer: PreTrainedTokenizerBase, key: str) -> bool:
    """Whether the chat template names a field of messages, or an argument."""
    template = tokenizer.chat_template or ""
    source = template if isinstance(template, str) else "\n".join(template.values())
    names = REASONING_FIELDS if key in REASONING_FIELDS else (key,)
    return any(re.search(rf"\b{re.escape(name)}\b", source) for name in names)


def _check_survives(answer: Message, rest: str) -> None:
    """Raises RowError if a part of the answer is not in the text that the template makes of it.

    White space does not count: templates trim and indent.
    """
    found = _squeezed(rest)
    calls = [call.get("function", call) for call in answer.get("tool_calls", [])]
    parts = [answer["content"], *(str(call.get("name", "")) for call in calls)]
    parts += [str(answer[key]) for key in REASONING_FIELDS if key in answer]  # type: ignore[literal-required]
    for part in parts:
        if _squeezed(part) not in found:
            raise RowError(
                "template_changes_completion",
                f"the chat template leaves out or changes a part of the completion: {brief(part)}",
            )


def _squeezed(text: str) -> str:
    return "".join(text.split())
