"""What a prepared run prints and writes: each number beside what is expected, and a JSON file at the end.

A section that raises, or that would start after the time is over, does not take the others with it: a card is
lent for minutes, and one fault must not cost the rest of the answers.
"""

import json
import platform
import time
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

SECONDS = 480.0
"""Most that a script may take; a section that would start later is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """One measured number."""

    section: str
    name: str
    value: float
    unit: str
    low: float | None
    """Least that is expected on a card; None without a bound."""
    high: float | None
    judged: bool
    """Whether the bounds hold where this was measured: a rehearsal's speed says nothing."""

    @property
    def as_expected(self) -> bool:
        """Whether it lies within its bounds, or is not judged."""
        below = self.low is not None and self.value < self.low
        above = self.high is not None and self.value > self.high
        return not self.judged or not (below or above)

    def line(self) -> str:
        """For people."""
        low, high = ("" if bound is None else f"{bound:g}" for bound in (self.low, self.high))
        expected = f"expected {low} to {high}" if low or high else ""
        mark = "" if self.as_expected else "   <-- not as expected"
        return f"  {self.name:<52} {self.value:>12.5g} {self.unit:<10} {expected}{mark}"


@dataclass(slots=True)
class Report:
    """Collects the numbers of one script."""

    script: str
    rehearse: bool
    output: Path
    seconds: float = SECONDS
    numbers: list[Number] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    """Section -> why it has no numbers, or not all."""
    took: dict[str, float] = field(default_factory=dict)
    """Section -> seconds."""
    _started: float = field(default_factory=time.monotonic)
    _section: str = ""

    def section(self, name: str, work: Callable[[], None]) -> None:
        """Runs a part of the script; what it raises becomes a problem of this section."""
        began, self._section = time.monotonic(), name
        if began - self._started > self.seconds:
            self.problems[name] = f"left out: {self.seconds:.0f} s were over"
            return
        print(f"{name}", flush=True)
        try:
            work()
        except Exception as error:  # whatever a card's first run brings
            self.problems[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        self.took[name] = time.monotonic() - began

    def number(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        low: float | None = None,
        high: float | None = None,
        speed: bool = True,
    ) -> None:
        """Records and prints a number.

        Args:
            name: What it is.
            value: In `unit`.
            unit: Its unit.
            low: Least that is expected.
            high: Most that is expected.
            speed: Whether it depends on the machine, so that a rehearsal does not judge it.
        """
        judged = not (self.rehearse and speed)
        found = Number(
            section=self._section, name=name, value=value, unit=unit, low=low, high=high, judged=judged
        )
        self.numbers.append(found)
        print(found.line(), flush=True)

    def finish(self) -> int:
        """Writes the JSON file; returns the exit status: 0 if everything is as expected, else 1."""
        wrong = [number.name for number in self.numbers if not number.as_expected]
        record = {
            "script": self.script,
            "rehearsal": self.rehearse,
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "device": device_name(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "not_as_expected": wrong,
            "problems": self.problems,
            "seconds": self.took,
            "numbers": [asdict(number) for number in self.numbers],
        }
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(record, indent=2) + "\n")
        for section, problem in self.problems.items():
            print(f"problem in {section}: {problem}")
        print(f"{len(self.numbers)} numbers, {len(wrong)} not as expected; {self.output}")
        return int(bool(wrong or self.problems))


def device() -> torch.device:
    """The card, or the CPU in a rehearsal."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    """Of the card, or `cpu`."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def options(
    script: str, description: str | None, *, more: Callable[[ArgumentParser], None] | None = None
) -> Namespace:
    """The command line of a script.

    Args:
        script: Its name, for its output.
        description: What it does.
        more: Adds its own options.
    """
    parser = ArgumentParser(description=description)
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes, also without a card")
    parser.add_argument("--output", type=Path, default=Path("gpu") / f"{script}.json", help="the JSON file")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="start no section after so long")
    if more is not None:
        more(parser)
    given = parser.parse_args()
    if not given.rehearse and not torch.cuda.is_available():
        parser.exit(
            2, f"{script}: torch sees no GPU; expected one, or --rehearse to try the script without\n"
        )
    return given
