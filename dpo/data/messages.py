"""Chat messages of a raw row: role and text, and the fields that go through the chat template beside them.

A field outside the allow-list is left to be named as unused. What a text model cannot read (pictures, sound)
is a `RowError`, and so is a message without text that calls no tool.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo.data.fields import Fields, RowError, brief, holds
from dpo.data.records import Message

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Names of an assistant's reasoning; transformers gives a template each under the name that it reads."""
MESSAGE_FIELDS = (*REASONING_FIELDS, "tool_calls", "name", "tool_call_id")
"""What a message may hold besides role and content."""
UNUSABLE_FIELDS = ("function_call", "function_calls", "functions", "images", "audio", "videos")
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}
"""Who speaks in a turn {from, value} -> the role."""


def read_messages(fields: Fields, value: Any, name: str) -> tuple[Message, ...]:
    """The turns of a list of messages.

    Args:
        fields: The row; message fields that are not used are left in it.
        value: As the row has it.
        name: The column, for messages to people.

    Raises:
        RowError: No list, no role, no text, or something that is no text.
    """
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError(
            "not_text",
            f"{name} is {brief(value)}; expected a string or a list of messages, like the rest of the row",
        )
    return tuple(_message(fields, _with_role(turn, name), name) for turn in value)


def _with_role(turn: Any, name: str) -> Any:
    """A turn of ShareGPT's layout, {from, value}, as {role, content}; any other as it is."""
    if not isinstance(turn, Mapping) or not {"from", "value"} <= turn.keys():
        return turn
    if (role := SHAREGPT_ROLES.get(turn["from"])) is None:
        expected = ", ".join(SHAREGPT_ROLES)
        raise RowError("unusable_field", f"{name} has a turn from {turn['from']!r}; expected {expected}")
    others = {key: value for key, value in turn.items() if key not in ("from", "value")}
    return {**others, "role": role, "content": turn["value"]}


def _message(fields: Fields, turn: Any, name: str) -> Message:
    role = turn.get("role") if isinstance(turn, Mapping) else None
    if not isinstance(role, str):
        raise RowError("not_text", f"{name} has the message {brief(turn)}; expected text as role and content")
    others = {key: value for key, value in turn.items() if key not in ("role", "content") and holds(value)}
    for key in others:
        if key in UNUSABLE_FIELDS:
            raise _unusable(f"{name} has a message with {key!r}")
    fields.leave(*(f"{name}.{key}" for key in others if key not in MESSAGE_FIELDS))
    message = Message(role=role, content="")
    if (calls := others.get("tool_calls")) is not None:
        message["tool_calls"] = list_of_objects(calls, f"{name}.tool_calls")
    for key in (*REASONING_FIELDS, "name", "tool_call_id"):
        if key in others:
            if not isinstance(others[key], str):
                raise RowError("not_text", f"{name}.{key} is {brief(others[key])}; expected a string")
            message[key] = others[key]  # type: ignore[literal-required]
    message["content"] = _content(turn, name, may_be_empty="tool_calls" in message)
    return message


def _content(turn: Mapping[str, Any], name: str, *, may_be_empty: bool) -> str:
    """The text of a message: a string, or parts of type text in a row."""
    content = turn.get("content")
    if content is None and may_be_empty:
        return ""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, Sequence) and content else [None]
    texts = []
    for part in parts:
        text = part
        if isinstance(part, Mapping) and isinstance(kind := part.get("type"), str):
            if kind != "text":
                raise _unusable(f"{name} has a message with a part of type {kind!r}")
            text = part.get("text")
        if not isinstance(text, str):
            raise RowError(
                "not_text", f"{name} has the message {brief(turn)}; expected text as role and content"
            )
        texts.append(text)
    return "".join(texts)


def messages_of_json(value: Any) -> Any:
    """A list of messages that is stored as JSON text, or one message alone; any other value as it is.

    Raises:
        RowError: A list of messages as Python prints it.
    """
    if isinstance(value, Mapping):
        return [value]
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    if re.match(r"\s*\[\s*\{\s*'(role|content)'\s*:", value):
        raise RowError("not_text", f"{brief(value)} is a list of messages as Python prints it; expected JSON")
    try:
        turns = json.loads(value)
    except ValueError:
        return value
    are_turns = turns and all(isinstance(turn, Mapping) and {"role", "content"} <= {*turn} for turn in turns)
    return turns if are_turns else value


def list_of_objects(value: Any, name: str) -> list[Any]:
    """Tools or tool calls, possibly stored as JSON text; without the nulls that a table fills in."""
    value = parsed(value, name)
    if not isinstance(value, Sequence) or not all(isinstance(item, Mapping) for item in value):
        raise RowError("bad_tools", f"{name} is {brief(value)}; expected a list of objects")
    return [_without_nulls(item) for item in value]


def parsed(value: Any, name: str) -> Any:
    """The value, read as JSON if it is a string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError("bad_tools", f"{name} is {brief(value)}, which is not JSON: {error}") from error


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_without_nulls(inner) for inner in value]
    return value


def _unusable(what: str) -> RowError:
    return RowError("unusable_field", f"{what}, which cannot be used; expected text alone")
