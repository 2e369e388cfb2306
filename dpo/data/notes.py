"""What reading a source left out: dropped rows by reason and columns that are not used, and how it is said.

Readers count here while they stream; `RowNotes` turns its counts into lines for people. Nothing is
ignored without a line: a column that is not read is named with its number of rows, a drop with its first row.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Self

MUCH_DROPPED = 0.2
"""Share of the rows above which their loss is a warning."""


@dataclass(slots=True, kw_only=True)
class RowNotes:
    """Counts over the rows of one source, complete when its stream has ended."""

    rows: int = 0
    """Rows that were read."""
    groups: int = 0
    """Groups that were tokenized, and those that were dropped then."""
    dropped_rows: int = 0
    dropped_groups: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    """Dropped rows by reason."""
    first: dict[str, str] = field(default_factory=dict)
    """Reason -> place and details of the first row that was dropped for it."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Column -> rows in which it holds something that is not used."""
    implied: int = 0
    """Rows without a prompt column, whose prompt is the words that their texts share."""
    implied_example: str = ""
    """The prompt of the first of them."""
    repeated: int = 0
    """Rows whose completions all start with the prompt, which is taken once."""

    texts: int = 0
    """Groups with a prompt of plain text, where the tokenizer has a chat template."""
    without_system: int = 0
    """Groups whose system turn the chat template leaves out."""
    dated: str = ""
    """The date that the chat template writes into every dialogue, if it writes one."""
    unscored: int = 0
    """Rows without scores, where a smallest margin between scores is asked for."""
    paired: int = 0
    """Rows that name their pairs, where another rule than the default is asked for."""
    labelled: int = 0
    """Rows whose completions have labels instead of rivals."""
    first_fault: str = ""
    """What is wrong with the first row that cannot be read, and where it is."""

    def plain(self) -> dict[str, Any]:
        """Name -> value, for JSON."""
        return {option.name: getattr(self, option.name) for option in fields(self)}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """The notes that are written as `plain` has them."""
        return cls(**{**plain, "drops": Counter(plain["drops"]), "ignored": Counter(plain["ignored"])})

    def moved(self, files: Mapping[str, str]) -> "RowNotes":
        """The notes where the files have other names: old name -> new name."""

        def place(text: str) -> str:
            old = next((old for old in files if text.startswith(f"{old}:")), None)
            return text if old is None else files[old] + text[len(old) :]

        first = {reason: place(detail) for reason, detail in self.first.items()}
        return replace(self, first=first, first_fault=place(self.first_fault))

    def add(self, later: "RowNotes") -> None:
        """Adds the notes of rows that come after these."""
        for name, theirs in later.plain().items():
            mine = getattr(self, name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, dict):
                setattr(self, name, theirs | mine)
            elif isinstance(mine, int):
                setattr(self, name, mine + theirs)
            else:
                setattr(self, name, mine or theirs)

    def drop(self, reason: str, detail: str) -> None:
        """Counts a dropped row; `detail` says where it is and what is wrong with it."""
        self.drops[reason] += 1
        self.first.setdefault(reason, detail)

    def lines(self, name: str) -> list[str]:
        """What is not used of a source with this name."""
        found = self.drop_lines(name)
        if self.ignored:
            listed = ", ".join(f"{column} ({rows} rows)" for column, rows in sorted(self.ignored.items()))
            found.append(f"{name}: columns that are not used: {listed}")
        if self.repeated:
            found.append(
                f"{name}: completions that repeat the prompt, which is taken once: {self.repeated} rows"
            )
        if self.dated:
            found.append(
                f"{name}: the chat template writes a date: all dialogues have {self.dated}, so that ids "
                "do not depend on the day (chat_template_kwargs of a row can say another)"
            )
        return found

    def drop_lines(self, name: str) -> list[str]:
        """One line per reason of what was dropped from a source with this name, with the first such row."""
        return [
            f"{name}: dropped {self.drops[reason]} as {reason}, first {detail}"
            for reason, detail in self.first.items()
        ]

    def warnings(self, name: str) -> list[str]:
        """What a person should check or mend in a source with this name."""
        warnings = []
        if self.implied and self.ignored:
            warnings.append(
                f"{name}: no column 'prompt': in {self.implied} of {self.rows} rows the prompt is the words "
                f"that chosen and rejected share at their start, first {self.implied_example!r}. If one of "
                "the columns that are not used is the prompt, name it 'prompt', or map it: "
                "data.train: {path: ..., columns: {prompt: COLUMN}}"
            )
        kept = _share_kept(self.dropped_rows, self.rows) * _share_kept(self.dropped_groups, self.groups)
        if round(1 - kept, 9) > MUCH_DROPPED:
            warnings.append(f"{name}: {1 - kept:.0%} of the rows are dropped; see the reasons above")
        if self.texts:
            warnings.append(
                f"{name}: {self.texts} of {self.groups} prompts are plain text and do not go through the "
                "model's chat template; a chat model expects messages: [{role, content}, ...]"
            )
        if self.without_system:
            warnings.append(
                f"{name}: the chat template leaves out the system turn of {self.without_system} of "
                f"{self.groups} prompts; put its text into the user's turn"
            )
        if self.unscored:
            warnings.append(
                f"{name}: min_margin has no effect on {self.unscored} of {self.rows} rows, without scores"
            )
        if self.paired:
            warnings.append(
                f"{name}: pairing has no effect on {self.paired} of {self.rows} rows: they name their pairs. "
                "Leave the column 'pairs' out, or prepare the data with python -m data_prep ... --pairing"
            )
        return warnings


class SourceGroups(NamedTuple):
    """A source's part of a data set: its groups are contiguous."""

    name: str
    """As in the configuration: a path or a hub name."""
    groups: int
    """Number of groups that it contributed."""
    notes: RowNotes
    """What of it is not used, and what a person should mend."""
    files: tuple[str, ...] = ()
    """The files that were read, in their order."""

    def named(self, name: str, files: Sequence[str]) -> "SourceGroups":
        """The same content under another name and in other files, in the same order."""
        moved = dict(zip(self.files, files, strict=True))
        return SourceGroups(name, self.groups, self.notes.moved(moved), tuple(files))

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {**self._asdict(), "notes": self.notes.plain()}

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Self:
        """The source that is written as `plain` has it."""
        return cls(plain["name"], plain["groups"], RowNotes.of(plain["notes"]), tuple(plain["files"]))


def _share_kept(dropped: int, of: int) -> float:
    return 1 - dropped / of if of else 1.0
