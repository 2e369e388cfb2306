"""The records that pass between stages: preference groups in text and in token ids, and sequence keys.

They are immutable and have no behaviour; every stage reads what the one before wrote.
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]
"""Token ids of a prompt or a completion. A token of a completion that is read but not trained on, such as the
answer of a tool, is stored as `~id`, which is negative: so it is part of the sequence's key."""
KEY_BYTES = 16
_KEY_VERSION = 1


class Message(TypedDict):
    """One turn of a chat."""

    role: str
    content: str
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]
    thinking: NotRequired[str]
    tool_calls: NotRequired[list[Any]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


NO_RIVAL = -1
"""In place of the index that a pair does not have."""


class Pair(NamedTuple):
    """Indices into a group's completions.

    A completion with a label instead of a rival is a pair with one index, and `NO_RIVAL`: it is chosen where
    it is desirable, and rejected where it is undesirable.
    """

    chosen: int
    rejected: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceGroup:
    """One prompt, its N completions, and preferences between them or their labels. A plain pair is N = 2."""

    prompt: str | tuple[Message, ...]
    """Text, or the turns of a chat before the completion."""
    completions: tuple[str, ...]
    pairs: tuple[Pair, ...]
    scores: tuple[float, ...] | None = None
    """One score per completion, higher is better; None where the data has none."""
    reference_scores: tuple[float, ...] | None = None
    """Scores of completions that the reference wrote to this prompt; None: `scores` are of such."""
    id: str | None = None
    """The data's own name for the group, if it has one."""
    conversations: tuple[tuple[Message, ...], ...] = ()
    """The messages of each completion, where one has several; of those the assistant's are trained on. Then
    `completions` are the texts of the last ones. Or empty."""
    message_fields: tuple[Mapping[str, Any], ...] = ()
    """What the message of each completion holds besides its text, such as tool calls; or empty."""
    template_fields: Mapping[str, Any] = field(default_factory=dict)
    """What the chat template gets besides the turns: tools, and arguments of its own."""
    continues: bool = False
    """Whether completions continue the prompt's last turn, which is the start of the assistant's answer."""
    place: str = field(default="", compare=False)
    """File and line, or row, that it was read from, for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedGroup:
    """A preference group in token ids, after template, EOS and truncation.

    `prompt` has at least one token (the first completion token needs a predictor); so has each completion.
    """

    prompt: TokenIds
    completions: tuple[TokenIds, ...]
    pairs: tuple[Pair, ...]
    margins: tuple[float, ...] | None = None
    """Score of the chosen minus score of the rejected completion, one per pair; None without scores."""
    quantiles: tuple[float, ...] | None = None
    """Share of the reference's completions that score no more than each completion; None without scores."""


def plain_ids(ids: TokenIds) -> TokenIds:
    """The ids of all tokens, whether they are trained on or not."""
    return np.where(ids < 0, ~ids, ids)


def num_trained(ids: TokenIds) -> int:
    """Number of tokens that are trained on."""
    return int((ids >= 0).sum())


def sequence_key(prompt: TokenIds, completion: TokenIds) -> bytes:
    """The 16-byte content key of one (prompt, completion): equal ids give equal keys, in any file or row.

    BLAKE2b over a version, both lengths and the ids as little-endian int32, so that ([1], [2, 3]) and
    ([1, 2], [3]) differ.

    Args:
        prompt: (T_p,) token ids.
        completion: (T_c,) token ids.
    """
    header = struct.pack("<Bqq", _KEY_VERSION, len(prompt), len(completion))
    digest = hashlib.blake2b(header, digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(prompt, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(completion, dtype="<i4").tobytes())
    return digest.digest()
