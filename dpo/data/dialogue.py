"""The prompt and the completions of a raw row, from columns, from the start of texts, or from conversations.

Texts stay texts and messages messages; what stands in columns such as question and system becomes turns.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from dpo.data.fields import Fields, RowError
from dpo.data.messages import messages_of_json, read_messages
from dpo.data.notes import RowNotes
from dpo.data.records import Message

ASSISTANT_TURN = "\n\nAssistant:"
"""Start of the assistant's turn in dialogues of HH-RLHF's format."""

SHORTEST_REPEATED = 20
"""Characters of a prompt that all completions start with, for it to be a repetition."""

Prompt = str | tuple[Message, ...]


class Dialogue(NamedTuple):
    """One prompt and its N completions."""

    prompt: Prompt
    completions: tuple[str, ...]
    """Their texts; "" where a completion is a call of a tool alone."""
    message_fields: tuple[Mapping[str, Any], ...]
    """What the message of each completion holds besides its text; empty where none does."""
    continues: bool
    """Whether completions continue the last turn of the prompt, which is the start of the answer."""
    conversations: tuple[tuple[Message, ...], ...] = ()
    """The messages of each completion, where one has several; else empty."""


def read_dialogue(fields: Fields, values: Sequence[Any], notes: RowNotes, *, may_imply: bool) -> Dialogue:
    """The prompt and the completions of a row.

    Args:
        fields: The row.
        values: The completions, as texts or as messages of which the last is the completion.
        notes: Counts prompts that texts imply or repeat.
        may_imply: Whether the start that two texts share may be the prompt.

    Raises:
        RowError: No prompt, no text, or turns that do not fit together.
    """
    message_fields: tuple[Mapping[str, Any], ...] = ()
    several: tuple[tuple[Message, ...], ...] = ()
    prompt, is_turn = _prompt_field(fields)
    prompt, values = messages_of_json(prompt), [messages_of_json(value) for value in values]
    system = fields.text("system")
    if prompt is None and not may_imply:
        raise fields.missing("prompt")
    if prompt is not None and not isinstance(prompt, str):
        prompt = read_messages(fields, prompt, "prompt")
    continues = isinstance(prompt, tuple) and ends_with_answer(prompt)
    if all(isinstance(value, str) for value in values):
        completions = tuple(values)
        if prompt is None:
            if system:
                raise fields.missing("prompt", " beside 'system'")
            prompt, completions = _implied_prompt(fields, *completions)
            if not prompt.endswith(ASSISTANT_TURN):
                notes.implied += 1
                notes.implied_example = notes.implied_example or prompt[:80]
        elif isinstance(prompt, str) and _repeat(prompt, completions):
            notes.repeated += 1
            completions = tuple(completion[len(prompt) :] for completion in completions)
        if isinstance(prompt, str) and (is_turn or system):
            prompt = (Message(role="user", content=prompt),)
    else:
        conversations = [read_messages(fields, value, "completion") for value in values]
        continues = continues and all(len(turns) == 1 for turns in conversations)
        prompt, conversations = _split_conversations(fields, prompt, conversations)
        completions = tuple(turns[-1]["content"] for turns in conversations)
        several = tuple(conversations) if any(len(turns) > 1 for turns in conversations) else ()
        others = tuple(_other_fields(turns[-1]) for turns in conversations)
        message_fields = others if any(others) and not several else ()
        if several and ends_with_answer(prompt):
            raise RowError("prompts_differ", "completions of several messages cannot continue the last turn")
    for index, completion in enumerate(completions):
        last = several[index][-1] if several else message_fields[index] if message_fields else {}
        if not completion.strip() and "tool_calls" not in last:
            raise RowError("empty_completion", f"a completion is {completion!r}; expected some text")
    return Dialogue(_with_system(prompt, system), completions, message_fields, continues, several)


def ends_with_answer(turns: Sequence[Message]) -> bool:
    """Whether the last turn is the start of an answer, which completions continue."""
    return turns[-1]["role"] == "assistant" and "tool_calls" not in turns[-1]


def _repeat(prompt: str, completions: Sequence[str]) -> bool:
    """Whether all completions start with the prompt; a short prompt may do so by chance."""
    return len(prompt.strip()) >= SHORTEST_REPEATED and all(
        completion.startswith(prompt) and completion[len(prompt) :].strip() for completion in completions
    )


def _other_fields(message: Message) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in ("role", "content")}


def _prompt_field(fields: Fields) -> tuple[Any, bool]:
    """The value of the prompt's column, and whether the column's name makes its text a user's turn."""
    if "prompt" in fields.names:
        return fields.needed("prompt"), False
    if (prompt := fields.get("prompt")) is not None:
        return prompt, False
    if instruction := fields.text("instruction"):
        extra = fields.text("input")
        return f"{instruction}\n{extra}" if extra.strip() else instruction, True
    if (conversation := fields.get("conversations")) is not None:
        return conversation, False
    for name in ("question", "input"):
        if (value := fields.get(name)) is not None:
            return value, True
    return None, False


def _with_system(prompt: Prompt, system: str) -> Prompt:
    """The prompt with a system turn at its start, where the row has one in a column of its own."""
    if not system or isinstance(prompt, str):
        return prompt
    if prompt[0]["role"] != "system":
        return (Message(role="system", content=system), *prompt)
    if prompt[0]["content"] != system:
        raise RowError("prompts_differ", "the field 'system' differs from the system turn of the prompt")
    return prompt


def _implied_prompt(fields: Fields, chosen: str, rejected: str) -> tuple[str, tuple[str, ...]]:
    """Splits two texts after their common part: dialogues after "Assistant:", other texts between words.

    "A b c" and "A b d" give the prompt "A b" and the completions " c" and " d". Texts without a common part
    imply no prompt: that of such a row stands in another column, or nowhere.
    """
    length = min(len(chosen), len(rejected))
    common = chosen[: next((i for i in range(length) if chosen[i] != rejected[i]), length)]
    if (turn := common.rfind(ASSISTANT_TURN)) >= 0:
        end = turn + len(ASSISTANT_TURN)
    else:  # a space belongs to the completion, a newline to the prompt
        end = max(common.rfind(" "), common.rfind("\n") + 1)
    if chosen != rejected and not common[:end].strip():
        raise fields.missing("prompt", ", and chosen and rejected share no words at their start")
    return common[:end], (chosen[end:], rejected[end:])


def _split_conversations(
    fields: Fields, prompt: Prompt | None, conversations: list[tuple[Message, ...]]
) -> tuple[tuple[Message, ...], list[tuple[Message, ...]]]:
    """The turns before the completions, and the messages of each completion.

    The prompt stands in its field, at the start of the conversations, or in both. Without a field it is what
    the conversations share up to an answer; a completion starts and ends with the assistant.
    """
    for turns in conversations:
        if turns[-1]["role"] != "assistant":
            raise RowError(
                "last_turn_not_assistant",
                f"a completion ends with the role {turns[-1]['role']!r}; expected assistant",
            )
    if isinstance(prompt, tuple):
        size = len(prompt)
        starts = [turns[:size] == prompt and len(turns) > size for turns in conversations]
        rests = [turns[size:] if all(starts) else turns for turns in conversations]
    else:
        size = _num_shared(conversations)
        rests = [turns[size:] for turns in conversations]
        if size == 0 and prompt is None:
            if any(turns[0]["role"] != "assistant" for turns in conversations):
                raise RowError("prompts_differ", "the completions do not share their first turn")
            raise fields.missing("prompt", ", and no turns before the assistant's")
        prompt = conversations[0][:size] or (Message(role="user", content=str(prompt)),)
    for turns in rests:
        roles = [turn["role"] for turn in turns]
        if roles[0] != "assistant" or ("assistant", "assistant") in pairwise(roles):
            raise RowError(
                "prompts_differ",
                f"a completion has the roles {', '.join(roles)} after the turns that all share; expected the "
                "assistant's, and those of tools or a user between two of the assistant's",
            )
    return prompt, rests


def _num_shared(conversations: Sequence[tuple[Message, ...]]) -> int:
    """Turns that all share, up to one after which the assistant answers in each."""
    shortest = min(map(len, conversations)) - 1
    first = conversations[0]
    same = next(
        (n for n in range(shortest) if any(turns[n] != first[n] for turns in conversations)), shortest
    )
    while same and any(turns[same]["role"] != "assistant" for turns in conversations):
        same -= 1
    return same
