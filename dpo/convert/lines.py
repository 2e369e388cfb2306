"""What became of each key of another trainer's configuration, for people and for the file that is written."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

Given = Mapping[str, Any]
"""Keys of theirs and their values."""
Lines = Iterator["Line"]


class Became(Enum):
    """What became of a key."""

    MAPPED = "mapped"
    NOT_NEEDED = "not needed"
    NOT_MAPPED = "not mapped"


@dataclass(frozen=True, slots=True)
class Line:
    """One key of theirs, or several that mean something together."""

    theirs: str
    became: Became
    ours: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> value."""
    said: str = ""
    """Why, or what differs."""

    def __str__(self) -> str:
        ours = f" -> {', '.join(f'{key}: {value}' for key, value in self.ours.items())}" if self.ours else ""
        return f"{self.theirs}{ours}{f' ({self.said})' if self.said else ''}"


def mapped(theirs: Given | str, ours: dict[str, Any], said: str = "") -> Line:
    """A line of keys that were mapped."""
    return Line(_named(theirs), Became.MAPPED, ours, said)


def not_mapped(theirs: Given | str, said: str) -> Line:
    """A line of keys that have no counterpart."""
    return Line(_named(theirs), Became.NOT_MAPPED, said=said)


def not_needed(theirs: Given | str, said: str) -> Line:
    """A line of keys that need no option here."""
    return Line(_named(theirs), Became.NOT_NEEDED, said=said)


def _named(theirs: Given | str) -> str:
    if isinstance(theirs, str):
        return theirs
    return ", ".join(f"{key}: {value}" for key, value in theirs.items()) or "(their default)"
