r"""Anthropic's HH-RLHF: pairs of whole dialogues -> the shared dialogue as prompt, the last turns as a pair.

Input rows are {chosen, rejected}, each a whole dialogue "\n\nHuman: ...\n\nAssistant: ...". As text, the
prompt ends with "\n\nAssistant:" and a completion starts with the space that follows; messages have no
markers.
"""

import argparse
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from data_prep.files import PreferenceWriter, describe_arguments
from data_prep.splits import open_inputs, read_inputs
from dpo.data.dialogue import ASSISTANT_TURN
from dpo.data.fields import RowError
from dpo.data.notes import RowNotes
from dpo.data.records import Message, PreferenceGroup
from dpo.data.rows import group_from_row

SUMMARY = "Anthropic's HH-RLHF dialogues; train and test never share the human's first turn."

_MARKER = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this source."""
    parser.add_argument(
        "input",
        nargs="+",
        metavar="INPUT",
        help=".jsonl.gz or .jsonl files, or a hub name (Anthropic/hh-rlhf)",
    )
    parser.add_argument(
        "--test",
        nargs="+",
        default=[],
        metavar="FILE",
        help="held-out files (default: the input's test split, else a share of the input)",
    )
    parser.add_argument(
        "--format", choices=("text", "messages"), default="text", help="format of the prompt (default: text)"
    )


def run(args: argparse.Namespace) -> None:
    """Writes the preference files. Raises UserError."""
    inputs = open_inputs(args.input, args.test)
    with PreferenceWriter(
        args.output,
        overwrite=args.overwrite,
        completions_are_complete=True,
        source=describe_arguments(args),
    ) as writer:
        writer.sources.extend(inputs.describe())
        convert = partial(hh_group, as_messages=args.format == "messages", notes=writer.notes)
        writer.write_all(read_inputs(inputs, convert, first_turn, args=args, notes=writer.notes))


def hh_group(row: Any, *, as_messages: bool, notes: RowNotes | None = None) -> PreferenceGroup:
    """One row as a group; columns that are not used are counted in `notes`.

    Raises:
        RowError: A faulty row, or dialogues that differ before the last assistant turn.
    """
    texts = [row.get(name) for name in ("chosen", "rejected")] if isinstance(row, Mapping) else []
    apart = any(isinstance(text, str) and ASSISTANT_TURN not in text for text in texts)
    group = None if apart else group_from_row(row, notes=notes)
    if group is None or not isinstance(group.prompt, str) or not group.prompt.endswith(ASSISTANT_TURN):
        raise RowError(
            "not_a_dialogue", 'the dialogues share no turn; expected "\\n\\nHuman: ... \\n\\nAssistant:"'
        )
    if any(_MARKER.search(completion) for completion in group.completions):
        raise RowError("prompts_differ", "the dialogues differ before the last assistant turn")
    turns = _turns(group.prompt)
    if not as_messages:
        return group
    if not all(turn["content"] for turn in turns):
        raise RowError("empty_turn", "a turn of the dialogue is empty; a chat template needs text")
    chosen, rejected = (text.strip() for text in group.completions)
    return group_from_row({"prompt": turns, "chosen": chosen, "rejected": rejected})


def first_turn(group: PreferenceGroup) -> str:
    """The human's first turn: the key that train and test must not share."""
    turns = _turns(group.prompt) if isinstance(group.prompt, str) else group.prompt
    return turns[0]["content"]


def _turns(prompt: str) -> tuple[Message, ...]:
    """A dialogue's turns, without the assistant's marker at its end."""
    before, *rest = _MARKER.split(prompt)
    pieces = list(zip(rest[::2], rest[1::2], strict=True))[:-1]
    if before.strip() or not pieces or pieces[0][0] != "Human":
        raise RowError("not_a_dialogue", 'the dialogue does not start with "\\n\\nHuman:"')
    return tuple(Message(role=_ROLES[speaker], content=text.strip()) for speaker, text in pieces)
