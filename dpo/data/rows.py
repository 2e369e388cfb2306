"""Raw rows -> preference groups: every common format of preference data, as one stream.

A row is a pair (prompt, chosen, rejected, as text or as messages, the prompt possibly implied) or a group
(prompt, completions, and pairs or scores). A faulty row is dropped and counted by reason, or is an error.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from dpo.data.pairing import PairingRule, pairs_from_scores
from dpo.data.records import Message, Pair, PreferenceGroup
from dpo.data.sources import PreferenceSource, read_rows
from dpo.errors import UserError

ASSISTANT_TURN = "\n\nAssistant:"
"""Start of the assistant's turn in dialogues of HH-RLHF's format."""

Prompt = str | tuple[Message, ...]


class RowError(ValueError):
    """What is wrong with one row: a short snake_case reason to count by, and a message with the details."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def read_groups(
    source: PreferenceSource,
    *,
    pairing: PairingRule,
    min_margin: float,
    strict: bool,
    drops: Counter[str],
    columns: Mapping[str, str] | None = None,
) -> Iterator[PreferenceGroup]:
    """Streams the preference groups of a source, in its order.

    Args:
        source: From `open_source`.
        pairing: How scores become pairs, where rows have scores and no pairs.
        min_margin: Scores that differ by no more than this make no pair.
        strict: Make the first faulty row an error.
        drops: Counts dropped rows by reason while the stream is read.
        columns: Name of a field -> the data's own name for it, where they differ: {"prompt": "question"}.

    Raises:
        UserError: A broken line or damaged file; with `strict`, a faulty row.
    """
    convert = partial(group_from_row, pairing=pairing, min_margin=min_margin, columns=columns)
    return convert_rows(read_rows(source), convert, strict=strict, drops=drops)


def convert_rows(
    rows: Iterable[tuple[str, Any]],
    convert: Callable[[Any], PreferenceGroup],
    *,
    strict: bool,
    drops: Counter[str],
) -> Iterator[PreferenceGroup]:
    """Streams `convert(row)` for (place, row); a `RowError` is counted, or with `strict` stops the stream."""
    for place, row in rows:
        try:
            group = convert(row)
        except RowError as fault:
            if strict:
                raise UserError(
                    f"{place}: {fault} ({fault.reason}); correct the row, or turn strict off to drop it"
                ) from fault
            drops[fault.reason] += 1
        else:
            yield group


def group_from_row(
    row: Any,
    *,
    pairing: PairingRule = "best-vs-rest",
    min_margin: float = 0.0,
    columns: Mapping[str, str] | None = None,
) -> PreferenceGroup:
    """One row in any of the formats as a preference group; arguments as for `read_groups`.

    Raises:
        RowError: The row has none of the formats, or no preference.
    """
    if not isinstance(row, Mapping):
        raise RowError(
            "not_an_object", f"a row is a {type(row).__name__}; expected an object with named fields"
        )
    names = columns or {}

    def field(name: str) -> Any:
        return row.get(names.get(name, name))

    def needed(name: str) -> Any:
        if (value := field(name)) is None:
            raise RowError("missing_field", f"no field {names.get(name, name)!r}; the row has {sorted(row)}")
        return value

    pairs: tuple[Pair, ...]
    scores: tuple[float, ...] | None = None
    if field("completions") is not None:
        values = _list(needed("completions"), "completions")
        if len(values) < 2:
            raise RowError("too_few_completions", f"completions has {len(values)}; expected at least 2")
        prompt, completions = _prompt_and_texts(needed("prompt"), values)
        if field("scores") is not None:
            scores = _scores(field("scores"), len(values))
        if field("pairs") is not None or scores is None:
            pairs = _pairs(needed("pairs"), len(values))
        else:
            pairs = pairs_from_scores(scores, pairing, min_margin)
    else:
        prompt, completions = _prompt_and_texts(field("prompt"), (needed("chosen"), needed("rejected")))
        pairs = (Pair(0, 1),)
    _check_pairs(pairs, completions)
    identifier = field("id")
    return PreferenceGroup(
        prompt=prompt,
        completions=completions,
        pairs=pairs,
        scores=scores,
        id=None if identifier is None else str(identifier),
    )


def _prompt_and_texts(prompt: Any, values: Sequence[Any]) -> tuple[Prompt, tuple[str, ...]]:
    """The prompt, and each completion as one string: its text, or the content of its last message."""
    if prompt is not None and not isinstance(prompt, str):
        prompt = _messages(prompt, "prompt")
    if all(isinstance(value, str) for value in values):
        completions = tuple(values)
        if prompt is None:
            prompt, completions = _implied_prompt(*completions)
    else:
        conversations = [_messages(value, "a completion") for value in values]
        prompt = _prompt_of_conversations(prompt, conversations)
        completions = tuple(turns[-1]["content"] for turns in conversations)
    for completion in completions:
        if not completion.strip():
            raise RowError("empty_completion", f"a completion is {completion!r}; expected some text")
    return prompt, completions


def _implied_prompt(chosen: str, rejected: str) -> tuple[str, tuple[str, ...]]:
    """Splits two texts after their common part: dialogues after "Assistant:", other texts between words.

    "A b c" and "A b d" give the prompt "A b" and the completions " c" and " d".
    """
    length = min(len(chosen), len(rejected))
    common = chosen[: next((i for i in range(length) if chosen[i] != rejected[i]), length)]
    if (turn := common.rfind(ASSISTANT_TURN)) >= 0:
        end = turn + len(ASSISTANT_TURN)
    else:  # a space belongs to the completion, a newline to the prompt
        end = max(common.rfind(" "), common.rfind("\n") + 1)
    return common[:end], (chosen[end:], rejected[end:])


def _prompt_of_conversations(
    prompt: Prompt | None, conversations: Sequence[tuple[Message, ...]]
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
        raise RowError("missing_field", "no field 'prompt', and no turns before the assistant's")
    return (Message(role="user", content=prompt),)


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError(
            "not_text",
            f"{name} is {_brief(value)}; expected a string or a list of messages, like the rest of the row",
        )
    turns = []
    for turn in value:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowError(
                "not_text", f"{name} has the message {_brief(turn)}; expected text as role and content"
            )
        turns.append(Message(role=role, content=content))
    return tuple(turns)


def _scores(value: Any, num_completions: int) -> tuple[float, ...]:
    scores = _list(value, "scores")
    if len(scores) != num_completions or not all(_is_number(score) for score in scores):
        raise RowError("bad_scores", f"scores is {_brief(value)}; expected {num_completions} numbers")
    if not all(map(math.isfinite, scores)):
        raise RowError("scores_not_finite", f"scores is {_brief(value)}; expected finite numbers")
    return tuple(map(float, scores))


def _pairs(value: Any, num_completions: int) -> tuple[Pair, ...]:
    pairs = []
    for item in _list(value, "pairs"):
        indices = (item.get("chosen"), item.get("rejected")) if isinstance(item, Mapping) else item
        if (
            not isinstance(indices, Sequence)
            or len(indices) != 2
            or not all(type(index) is int for index in indices)
        ):
            raise RowError(
                "bad_pairs", f"a pair is {_brief(item)}; expected two indices, chosen and rejected"
            )
        if not all(0 <= index < num_completions for index in indices):
            raise RowError(
                "pair_out_of_range",
                f"a pair is {_brief(item)}; expected indices from 0 to {num_completions - 1}",
            )
        pairs.append(Pair(*indices))
    return tuple(pairs)


def _check_pairs(pairs: Sequence[Pair], completions: Sequence[str]) -> None:
    if not pairs:
        raise RowError("no_pairs", "the row prefers no completion to another")
    preferences = {(completions[pair.chosen], completions[pair.rejected]) for pair in pairs}
    for chosen, rejected in preferences:
        if chosen == rejected:
            raise RowError("identical_completions", f"chosen and rejected are both {_brief(chosen)}")
        if (rejected, chosen) in preferences:
            raise RowError(
                "pair_both_ways", f"{_brief(chosen)} is preferred to {_brief(rejected)} and the reverse"
            )


def _list(value: Any, name: str) -> Sequence[Any]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowError("not_a_list", f"{name} is {_brief(value)}; expected a list")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
