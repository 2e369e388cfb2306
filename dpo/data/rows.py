"""Raw rows -> preference groups: every common format of preference data, as one stream.

A row is a pair (prompt, chosen, rejected, as text or as messages, the prompt possibly implied) or a group
(prompt, completions, and pairs or scores). A faulty row is dropped and counted by reason, or is an error. A
column that is not read is counted by name.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dpo.data.fields import Fields, RowError, as_list, brief
from dpo.data.notes import RowNotes
from dpo.data.pairing import PairingRule, pairs_from_scores
from dpo.data.records import Message, Pair, PreferenceGroup
from dpo.data.sources import PreferenceSource, read_rows
from dpo.errors import UserError

ASSISTANT_TURN = "\n\nAssistant:"
"""Start of the assistant's turn in dialogues of HH-RLHF's format."""

Prompt = str | tuple[Message, ...]


def read_groups(
    source: PreferenceSource,
    *,
    pairing: PairingRule,
    min_margin: float,
    strict: bool,
    notes: RowNotes,
    columns: Mapping[str, str] | None = None,
) -> Iterator[PreferenceGroup]:
    """Streams the preference groups of a source, in its order.

    Args:
        source: From `open_source`.
        pairing: How scores become pairs, where rows have scores and no pairs.
        min_margin: Scores that differ by no more than this make no pair.
        strict: Make the first faulty row an error.
        notes: Counts dropped rows and unused columns while the stream is read.
        columns: Name of a field -> the data's own name for it, where they differ: {"prompt": "question"}.

    Raises:
        UserError: A broken line or damaged file; with `strict`, a faulty row.
    """
    convert = partial(group_from_row, pairing=pairing, min_margin=min_margin, columns=columns, notes=notes)
    return convert_rows(read_rows(source), convert, strict=strict, notes=notes)


def convert_rows(
    rows: Iterable[tuple[str, Any]],
    convert: Callable[[Any], PreferenceGroup],
    *,
    strict: bool,
    notes: RowNotes,
) -> Iterator[PreferenceGroup]:
    """Streams `convert(row)` for (place, row); a `RowError` is counted, or with `strict` stops the stream."""
    for place, row in rows:
        notes.rows += 1
        try:
            group = replace(convert(row), place=place)
        except RowError as fault:
            if strict:
                raise UserError(
                    f"{place}: {fault} ({fault.reason}); correct the row, or turn strict off to drop it"
                ) from fault
            notes.drop(fault.reason, f"{place}: {fault}")
        else:
            yield group


def group_from_row(
    row: Any,
    *,
    pairing: PairingRule = "best-vs-rest",
    min_margin: float = 0.0,
    columns: Mapping[str, str] | None = None,
    notes: RowNotes | None = None,
) -> PreferenceGroup:
    """One row in any of the formats as a preference group; arguments as for `read_groups`.

    Raises:
        RowError: The row has none of the formats, or no preference, or a column that cannot be used.
    """
    fields = Fields(row, columns or {})
    notes = notes or RowNotes()
    pairs: tuple[Pair, ...]
    scores: tuple[float, ...] | None = None
    if fields.get("completions") is not None:
        values = as_list(fields.needed("completions"), "completions")
        if len(values) < 2:
            raise RowError("too_few_completions", f"completions has {len(values)}; expected at least 2")
        prompt, completions = _prompt_and_texts(fields, values, None)
        if fields.get("scores") is not None:
            scores = _scores(fields.get("scores"), len(values))
        if fields.get("pairs") is not None or scores is None:
            pairs = _pairs(fields.needed("pairs"), len(values))
        else:
            pairs = pairs_from_scores(scores, pairing, min_margin)
    else:
        values = [fields.needed("chosen"), fields.needed("rejected")]
        prompt, completions = _prompt_and_texts(fields, values, notes)
        pairs = (Pair(0, 1),)
    _check_pairs(pairs, completions)
    identifier = fields.get("id")
    notes.ignored.update(fields.unread())
    return PreferenceGroup(
        prompt=prompt,
        completions=completions,
        pairs=pairs,
        scores=scores,
        id=None if identifier is None else str(identifier),
    )


def _prompt_and_texts(
    fields: Fields, values: Sequence[Any], notes: RowNotes | None
) -> tuple[Prompt, tuple[str, ...]]:
    """The prompt, and each completion as one string: its text, or the content of its last message.

    The values of a pair may imply the prompt, which is then counted in `notes`.
    """
    prompt, is_turn = _prompt_field(fields)
    system = fields.text("system")
    if prompt is None and notes is None:
        raise fields.missing("prompt")
    if prompt is not None and not isinstance(prompt, str):
        prompt = _messages(prompt, "prompt")
    if all(isinstance(value, str) for value in values):
        completions = tuple(values)
        if prompt is None:
            if system:
                raise fields.missing("prompt", " beside 'system'")
            prompt, completions = _implied_prompt(fields, *completions)
            if notes is not None and not prompt.endswith(ASSISTANT_TURN):
                notes.implied += 1
                notes.implied_example = notes.implied_example or prompt[:80]
        if isinstance(prompt, str) and (is_turn or system):
            prompt = (Message(role="user", content=prompt),)
    else:
        conversations = [_messages(value, "a completion") for value in values]
        prompt = _prompt_of_conversations(fields, prompt, conversations)
        completions = tuple(turns[-1]["content"] for turns in conversations)
    for completion in completions:
        if not completion.strip():
            raise RowError("empty_completion", f"a completion is {completion!r}; expected some text")
    return _with_system(prompt, system), completions


def _prompt_field(fields: Fields) -> tuple[Any, bool]:
    """The value of the prompt's column, and whether the column's name makes its text a user's turn."""
    if "prompt" in fields.names:
        return fields.needed("prompt"), False
    if (prompt := fields.get("prompt")) is not None:
        return prompt, False
    if instruction := fields.text("instruction"):
        extra = fields.text("input")
        return f"{instruction}\n{extra}" if extra.strip() else instruction, True
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


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise RowError(
            "not_text",
            f"{name} is {brief(value)}; expected a string or a list of messages, like the rest of the row",
        )
    turns = []
    for turn in value:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise RowError(
                "not_text", f"{name} has the message {brief(turn)}; expected text as role and content"
            )
        turns.append(Message(role=role, content=content))
    return tuple(turns)


def _scores(value: Any, num_completions: int) -> tuple[float, ...]:
    scores = as_list(value, "scores")
    if len(scores) != num_completions or not all(_is_number(score) for score in scores):
        raise RowError("bad_scores", f"scores is {brief(value)}; expected {num_completions} numbers")
    if not all(map(math.isfinite, scores)):
        raise RowError("scores_not_finite", f"scores is {brief(value)}; expected finite numbers")
    return tuple(map(float, scores))


def _pairs(value: Any, num_completions: int) -> tuple[Pair, ...]:
    pairs = []
    for item in as_list(value, "pairs"):
        indices = (item.get("chosen"), item.get("rejected")) if isinstance(item, Mapping) else item
        if (
            not isinstance(indices, Sequence)
            or len(indices) != 2
            or not all(type(index) is int for index in indices)
        ):
            raise RowError("bad_pairs", f"a pair is {brief(item)}; expected two indices, chosen and rejected")
        if not all(0 <= index < num_completions for index in indices):
            raise RowError(
                "pair_out_of_range",
                f"a pair is {brief(item)}; expected indices from 0 to {num_completions - 1}",
            )
        pairs.append(Pair(*indices))
    return tuple(pairs)


def _check_pairs(pairs: Sequence[Pair], completions: Sequence[str]) -> None:
    if not pairs:
        raise RowError("no_pairs", "the row prefers no completion to another")
    preferences = {(completions[pair.chosen], completions[pair.rejected]) for pair in pairs}
    for chosen, rejected in preferences:
        if chosen == rejected:
            raise RowError("identical_completions", f"chosen and rejected are both {brief(chosen)}")
        if (rejected, chosen) in preferences:
            raise RowError(
                "pair_both_ways", f"{brief(chosen)} is preferred to {brief(rejected)} and the reverse"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
