"""The columns of one raw row: found under our names of them, and remembered when they are read.

What a reader did not read can so be named. `RowError` says what is wrong with a row; every reader of rows
raises it.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

UNUSABLE_COLUMNS = ("image", "images", "audio", "audios", "video", "videos", "history")
"""Columns that are part of what a completion answers, and that a text model or this reader cannot use."""


class RowError(ValueError):
    """What is wrong with one row: a short snake_case reason to count by, and a message with the details."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Fields:
    """The columns of one row; those that are read are part of what we use."""

    def __init__(self, row: Any, names: Mapping[str, str]) -> None:
        """Raises RowError if the row is no object.

        Args:
            row: As the source has it.
            names: Name of a field -> the data's own name for it, where they differ.
        """
        if not isinstance(row, Mapping):
            raise RowError(
                "not_an_object", f"a row is a {type(row).__name__}; expected an object with named fields"
            )
        self.names = names
        self._row = row
        self._read: set[str] = set()
        self._left: set[str] = set()

    def get(self, name: str) -> Any:
        """The value, or None where the row has none."""
        column = self.names.get(name, name)
        self._read.add(column)
        return self._row.get(column)

    def text(self, name: str) -> str:
        """The value, or "" where the row has none; RowError if it is no string."""
        if not isinstance(value := self.get(name), str | None):
            raise RowError("not_text", f"{name} is {brief(value)}; expected a string")
        return value or ""

    def needed(self, name: str) -> Any:
        """The value; RowError where the row has none."""
        if (value := self.get(name)) is None:
            raise self.missing(name)
        return value

    def missing(self, name: str, why: str = "") -> RowError:
        """The error for a field that the row lacks."""
        column = self.names.get(name, name)
        return RowError(
            "missing_field",
            f"no field {column!r}{why}; the row has {sorted(self._row)}; rename the column, or map it: "
            f"data.train: {{path: ..., columns: {{{name}: COLUMN}}}}",
        )

    def leave(self, *names: str) -> None:
        """Names parts of a value that are not used."""
        self._left.update(names)

    def unread(self) -> list[str]:
        """What holds something and is not used; RowError if a column of it cannot be left out."""
        found = [name for name, value in self._row.items() if name not in self._read and holds(value)]
        for name in found:
            if name in UNUSABLE_COLUMNS:
                raise RowError(
                    "unusable_field",
                    f"the field {name!r} is part of the question and cannot be used; expected text alone",
                )
        return [*found, *sorted(self._left)]


def holds(value: Any) -> bool:
    """Whether a column holds anything: tables fill absent fields with null or empty values."""
    return value is not None and not (isinstance(value, str | Sequence | Mapping) and len(value) == 0)


def broken_at(text: str) -> int | None:
    """Where a text has half of a surrogate pair, which no tokenizer takes; None if nowhere."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def as_list(value: Any, name: str) -> Sequence[Any]:
    """The value, which may be written as JSON; RowError if it is no list."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise RowError("not_a_list", f"{name} is {brief(value)}; expected a list")
    return value


def brief(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
