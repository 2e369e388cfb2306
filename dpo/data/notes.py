"""What reading a source left out: dropped rows by reason and columns that are not used, and how it is said.

Readers count here while they stream; `RowNotes` turns its counts into lines for people. Nothing is
ignored without a line: a column that is not read is named with its number of rows, a drop with its first row.
"""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class RowNotes:
    """Counts over the rows of one source, complete when its stream has ended."""

    rows: int = 0
    """Rows that were read."""
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
                f"the columns that are not used is the prompt, name it 'prompt', or map it with "
                "python -m data_prep preferences --columns prompt=COLUMN"
            )
        return warnings
