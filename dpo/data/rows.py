"""Raw rows -> preference groups: every common format of preference data, as one stream.

A row is a pair (prompt, chosen, rejected, as text or as messages, the prompt possibly implied), a group
(prompt, completions, and pairs, scores or labels), or a labelled completion (prompt, completion, label). A
faulty row is dropped and counted by reason, or is an error. A column that is not read is counted by name.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from dpo.data.dialogue import Dialogue, read_dialogue
from dpo.data.fields import Fields, RowError, as_list, brief, broken_at, holds
from dpo.data.layouts import in_our_columns
from dpo.data.messages import list_of_objects, parsed
from dpo.data.notes import RowNotes
from dpo.data.pairing import DEFAULT_PAIRING, PairingRule, pairs_from_scores, quantiles
from dpo.data.records import NO_RIVAL, Pair, PreferenceGroup
from dpo.errors import UserError

MEDIAN = 0.5
"""A score above this quantile of the reference's is desirable, where the row does not say."""
LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""How a label is written -> whether the completion is desirable."""


def read_groups(
    rows: Iterable[tuple[str, Any]],
    *,
    pairing: PairingRule,
    min_margin: float,
    strict: bool,
    notes: RowNotes,
    columns: Mapping[str, str] | None = None,
) -> Iterator[PreferenceGroup]:
    """Streams the preference groups of raw rows, in their order.

    Args:
        rows: Each with its place, for messages; from `dpo.data.sources.read_rows`.
        pairing: How scores become pairs, where rows have scores and no pairs.
        min_margin: Scores that differ by no more than this make no pair, and leave none where rows name both.
        strict: Make the first faulty row an error.
        notes: Counts dropped rows and unused columns while the stream is read.
        columns: Name of a field -> the data's own name for it, where they differ: {"prompt": "question"}.

    Raises:
        UserError: A broken line or damaged file; with `strict`, a faulty row.
    """
    convert = partial(group_from_row, pairing=pairing, min_margin=min_margin, columns=columns, notes=notes)
    return convert_rows(rows, convert, strict=strict, notes=notes)


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
            _check_encodable(group)
        except RowError as fault:
            found = f"{place}: {fault} ({fault.reason}); correct the row, or turn strict off to drop it"
            if strict:
                raise UserError(found) from fault
            notes.first_fault = notes.first_fault or found
            notes.dropped_rows += 1
            notes.drop(fault.reason, f"{place}: {fault}")
        else:
            yield group


def group_from_row(
    row: Any,
    *,
    pairing: PairingRule = DEFAULT_PAIRING,
    min_margin: float = 0.0,
    columns: Mapping[str, str] | None = None,
    notes: RowNotes | None = None,
) -> PreferenceGroup:
    """One row in any of the formats as a preference group; arguments as for `read_groups`.

    Raises:
        RowError: The row has none of the formats, or no preference, or a column that cannot be used.
    """
    fields = Fields(in_our_columns(row), columns or {})
    notes = notes or RowNotes()
    template_fields = _template_fields(fields)
    pairs: tuple[Pair, ...]
    scores: tuple[float, ...] | None = None
    of_reference = _scores_of_reference(fields)
    if fields.get("completions") is not None:
        values = as_list(fields.needed("completions"), "completions")
        kinds = ("pairs", "scores", "labels")
        if of_reference is not None:  # then scores need not be there to make pairs
            kinds = ("pairs", "labels", "scores")
        given = next((name for name in kinds if fields.get(name) is not None), "pairs")
        if len(values) < (1 if given == "labels" else 2):
            raise RowError("too_few_completions", f"completions has {len(values)}; expected at least 2")
        dialogue = read_dialogue(fields, values, notes, may_imply=False)
        if fields.get("scores") is not None:
            scores = _scores(fields.get("scores"), len(values))
        if given == "labels":
            pairs = _labelled(as_list(fields.get("labels"), "labels"), len(values))
        elif given == "pairs":
            pairs = _pairs(fields.needed("pairs"), len(values))
            notes.paired += pairing != DEFAULT_PAIRING
        else:
            assert scores is not None
            pairs = pairs_from_scores(scores, pairing, min_margin)
    elif fields.get("chosen") is None and fields.get("completion") is not None:
        dialogue = read_dialogue(fields, [fields.needed("completion")], notes, may_imply=False)
        if of_reference is not None and fields.get("score") is not None:  # or it says nothing by itself
            scores = _scores([fields.get("score")], 1)
        label = fields.get("label")
        if label is None and scores is not None and of_reference is not None:
            label = quantiles(scores, of_reference)[0] > MEDIAN
        pairs = _labelled([fields.needed("label") if label is None else label], 1)
    else:
        values = [fields.needed("chosen"), fields.needed("rejected")]
        dialogue = read_dialogue(fields, values, notes, may_imply=True)
        scores, pairs = _scores_of_pair(fields), (Pair(0, 1),)
    notes.labelled += NO_RIVAL in pairs[0] if pairs else False
    notes.unscored += scores is None and min_margin > 0
    if template_fields and isinstance(dialogue.prompt, str):
        raise RowError(
            "unusable_field", f"{', '.join(template_fields)} beside a prompt of plain text; expected turns"
        )
    _check_pairs(pairs, dialogue)
    if scores is not None and NO_RIVAL not in pairs[0]:
        pairs = _above_margin(pairs, scores, min_margin, notes)
    identifier = fields.get("id")
    notes.ignored.update(fields.unread())
    return PreferenceGroup(
        prompt=dialogue.prompt,
        completions=dialogue.completions,
        pairs=pairs,
        scores=scores,
        reference_scores=of_reference,
        id=None if identifier is None else str(identifier),
        conversations=dialogue.conversations,
        message_fields=dialogue.message_fields,
        template_fields=template_fields,
        continues=dialogue.continues,
    )


def _check_encodable(group: PreferenceGroup) -> None:
    """Raises RowError for text that is not Unicode, such as half of an emoji in JSON."""
    texts = [*group.completions, group.id or ""]
    if isinstance(group.prompt, str):
        texts.append(group.prompt)
    else:
        others = (group.prompt, group.conversations, group.message_fields, dict(group.template_fields))
        texts.append(json.dumps(others, ensure_ascii=False, default=str))
    for text in texts:
        if (place := broken_at(text)) is not None:
            raise RowError(
                "not_unicode",
                f"half of a surrogate pair after {text[max(0, place - 20) : place]!r}; expected text",
            )


def _template_fields(fields: Fields) -> dict[str, Any]:
    """What the chat template gets besides the turns: tools, and the row's own arguments of the template."""
    found: dict[str, Any] = {}
    if holds(options := fields.get("chat_template_kwargs")):
        if not isinstance(options := parsed(options, "chat_template_kwargs"), Mapping):
            raise RowError("bad_tools", f"chat_template_kwargs is {brief(options)}; expected an object")
        found |= {str(key): value for key, value in options.items() if value is not None}
    if holds(tools := fields.get("tools")) and (listed := list_of_objects(tools, "tools")):
        found["tools"] = listed
    return found


def _scores_of_pair(fields: Fields) -> tuple[float, ...] | None:
    """The scores of chosen and rejected, where the row has both."""
    scores = [fields.get("score_chosen"), fields.get("score_rejected")]
    return None if None in scores else _scores(scores, 2)


def _above_margin(
    pairs: tuple[Pair, ...], scores: Sequence[float], min_margin: float, notes: RowNotes
) -> tuple[Pair, ...]:
    """The pairs whose chosen score is higher by more than `min_margin`; RowError if none is left."""
    least = max(min_margin, 0.0)
    kept = tuple(pair for pair in pairs if scores[pair.chosen] - scores[pair.rejected] > least)
    if not kept:
        chosen, rejected = pairs[0]
        raise RowError(
            "no_pair_above_margin",
            f"chosen has the score {scores[chosen]:g}, rejected {scores[rejected]:g}; expected a difference "
            f"of more than {least:g} (min_margin)",
        )
    if len(kept) < len(pairs):
        notes.drops["pair_below_margin"] += len(pairs) - len(kept)
    return kept


def _scores_of_reference(fields: Fields) -> tuple[float, ...] | None:
    """The scores of completions that the reference wrote, where the row has some."""
    value = fields.get("reference_scores")
    return _scores(value, None, "reference_scores") if holds(value) else None


def _scores(value: Any, number: int | None, name: str = "scores") -> tuple[float, ...]:
    """So many numbers, or any."""
    scores = _numbers(as_list(value, name))
    if number not in (None, len(scores)) or not all(_is_number(score) for score in scores):
        raise RowError("bad_scores", f"{name} is {brief(value)}; expected {number or 'only'} numbers")
    if not all(map(math.isfinite, scores)):
        raise RowError("scores_not_finite", f"{name} is {brief(value)}; expected finite numbers")
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


def _labelled(labels: Sequence[Any], num_completions: int) -> tuple[Pair, ...]:
    """Labels as pairs with one side; RowError for what is neither true nor false."""
    if len(labels) != num_completions:
        raise RowError("bad_label", f"labels is {brief(labels)}; expected {num_completions} of them")
    pairs = []
    for index, label in enumerate(labels):
        known = LABELS.get(str(label).strip().lower())
        if known is None:
            raise RowError("bad_label", f"a label is {brief(label)}; expected true or false, or 1 or 0")
        pairs.append(Pair(index, NO_RIVAL) if known else Pair(NO_RIVAL, index))
    return tuple(pairs)


def _check_pairs(pairs: Sequence[Pair], dialogue: Dialogue) -> None:
    if not pairs:
        raise RowError("no_pairs", "the row prefers no completion to another")
    completions: Sequence[str] = dialogue.completions
    if dialogue.conversations:
        completions = [json.dumps(turns, sort_keys=True, default=str) for turns in dialogue.conversations]
    elif dialogue.message_fields:  # completions may differ in a call or in their reasoning alone
        both = zip(completions, dialogue.message_fields, strict=True)
        completions = [json.dumps(one, sort_keys=True, default=str) for one in both]
    desirable = {completions[pair.chosen] for pair in pairs if pair.rejected == NO_RIVAL}
    undesirable = {completions[pair.rejected] for pair in pairs if pair.chosen == NO_RIVAL}
    for completion in desirable & undesirable:
        raise RowError("label_both_ways", f"{brief(completion)} is labelled true and false")
    preferences = {
        (completions[pair.chosen], completions[pair.rejected]) for pair in pairs if NO_RIVAL not in pair
    }
    for chosen, rejected in preferences:
        if chosen == rejected:
            raise RowError("identical_completions", f"chosen and rejected are both {brief(chosen)}")
        if (rejected, chosen) in preferences:
            raise RowError(
                "pair_both_ways", f"{brief(chosen)} is preferred to {brief(rejected)} and the reverse"
            )


def _numbers(values: Sequence[Any]) -> Sequence[Any]:
    """The values; as numbers if all are strings, as the cells of a spreadsheet are."""
    if all(isinstance(value, str) for value in values):
        with suppress(ValueError):
            return [float(value) for value in values]
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
