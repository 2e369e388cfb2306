"""The prompt and the completions of a raw row, from columns, from the start of texts, or from conversations.

Texts stay texts and messages messages; what stands in columns such as question and system becomes turns.
"""

from collections.abc import Mapping, Sequence
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
        prompt = _prompt_of_conversations(fields, prompt, conversations)
        completions = tuple(turns[-1]["content"] for turns in conversations)
        others = tuple(_other_fields(turns[-1]) for turns in conversations)
        message_fields = others if any(others) else ()
        continues = continues and all(len(turns) == 1 for turns in conversations)
    for index, completion in enumerate(completions):
        if not completion.strip() and not (message_fields and "tool_calls" in message_fields[index]):
            raise RowError("empty_completion", f"a completion is {completion!r}; expected some text")
    return Dialogue(_with_system(prompt, system), completions, message_fields, continues)


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


def _prompt_of_conversations(
    fields: Fields, prompt: Prompt | None, conversations: Sequence[tuple[Message, ...]]
) -> tuple[Message, ...]:
    """The turns before the completion: from the prompt field, from the conversations, or in both."""
    shared = conversations[0][:-1]
    for turns in conversations:
        if turns[-1]["role"] != "assistant":
            raise RowError(
                "last_turn_not_assistant",
                f"a completion ends with the role {turns[-1]['role']!r}; expected assistant",
            )
        if turns[:-1] != shared:
            raise RowError("prompts_differ", "the completions do not share all turns before the last one")
    if isinstance(prompt, tuple):
        if shared and shared != prompt:
            raise RowError("prompts_differ", "the completions' first turns differ from the prompt")
        return prompt
    if shared:
        return shared
    if prompt is None:
        raise fields.missing("prompt", ", and no turns before the assistant's")
    return (Message(role="user", content=prompt),)
