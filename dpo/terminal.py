"""What a command prints while it runs: one bar per stage, notes, warnings, and a box at the end.

Three modes, chosen by an environment variable so that all ranks have the same. Plain: bars on a terminal, and
an occasional line in a file. `quiet`: warnings, errors and the box. `json`: one JSON object per line on
standard output, for batch systems; its `event` is note, warning, metrics, evaluation, summary, end, or what a
command answers. Only the main process prints.
"""

import io
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import IO, Any, Literal, NoReturn, TypeVar, cast

from tqdm import tqdm

from dpo import alive

T = TypeVar("T")

OUTPUT = "DPO_OUTPUT"
"""Environment variable with the mode: quiet, json, or nothing."""
FLAGS = {"--quiet": "quiet", "--json_lines": "json"}
FILE_SECONDS = 30.0
"""How often a bar writes a line into a file."""
WIDEST = 100
tqdm.monitor_interval = 0  # a thread that shares a lock: see dpo.interrupts
_started = time.monotonic()


def mode() -> Literal["plain", "quiet", "json"]:
    """The output mode of this process."""
    chosen = os.environ.get(OUTPUT, "")
    return cast(Literal["quiet", "json"], chosen) if chosen in FLAGS.values() else "plain"


def note(*lines: str) -> None:
    """Prints information that needs no action."""
    if lines and _prints() and mode() != "quiet":
        _say("note", lines)


def warning(*lines: str) -> None:
    """Prints what a person should act on or know; in every mode."""
    if lines and _prints():
        _say("warning", lines)


def answer(kind: str, text: str, values: Mapping[str, Any]) -> None:
    """Prints what a command was asked for: a text in every mode but `json`, which has it as an event.

    Args:
        kind: Of the event.
        text: For people.
        values: The same for programs.
    """
    if not _prints():
        return
    if mode() == "json":
        event(kind, values)
    else:
        print(text, flush=True)


def event(kind: str, values: Mapping[str, Any]) -> None:
    """Prints a line of JSON in the mode `json`."""
    if _prints() and mode() == "json":
        print(json.dumps({"event": kind, **values}), flush=True)


def summary(title: str, rows: Mapping[str, str]) -> None:
    """Prints the box at the end of a command: what was made, where, what next, and how long it took.

    In a file it has no frame.

    Args:
        title: The command.
        rows: Label -> text, which may have several lines; an empty one is left out.
    """
    if not _prints():
        return
    seconds = time.monotonic() - _started
    rows = {label: text for label, text in rows.items() if text} | {"took": duration(seconds)}
    if mode() == "json":
        event("summary", {"command": title, **rows, "seconds": round(seconds, 1)})
        return
    if sys.stdout.isatty():
        width = min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST)
        print(box(title, rows, width, colour="NO_COLOR" not in os.environ), flush=True)
    else:
        print(listing(title, rows), flush=True)


def listing(title: str, rows: Mapping[str, str]) -> str:
    """`box` for files: without a frame, and with unbroken lines, so that it can be searched."""
    width = max(map(len, rows))
    lines = [title]
    for label, text in rows.items():
        heads = [label, *[""] * text.count("\n")]
        lines += [f"  {head:<{width}}  {line}" for head, line in zip(heads, text.splitlines(), strict=True)]
    return "\n".join(lines)


def box(title: str, rows: Mapping[str, str], width: int, *, colour: bool = False) -> str:
    """Labels and texts in a frame.

    Args:
        title: In the upper edge.
        rows: Label -> text; long lines are wrapped, words that are too long (paths) are not broken.
        width: Columns of the frame, at least 40.
        colour: Whether the title is bold green, for terminals.
    """
    width = max(width, 40)
    label_width = max(map(len, rows))
    room = width - label_width - len("│   │")
    shown = f"\033[1;32m{title}\033[0m" if colour else title
    lines = [f"╭─ {shown} {'─' * (width - len(title) - 5)}╮"]
    for label, text in rows.items():
        parts = [
            part
            for line in text.splitlines()
            for part in textwrap.wrap(line, room, break_long_words=False, break_on_hyphens=False) or [""]
        ]
        for index, part in enumerate(parts):
            head = label if index == 0 else ""
            lines.append(f"│ {head:<{label_width}}  {part:<{room}}│")
    return "\n".join([*lines, f"╰{'─' * (width - 2)}╯"])


def duration(seconds: float) -> str:
    """9.4 s, 3 min 20 s or 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def progress(items: Iterable[T], *, description: str, unit: str, leave: bool = True) -> "tqdm[T]":
    """Iterates with a bar and an ETA; in a file, one line every half minute. Each item is a sign of life.

    Args:
        items: What to iterate over.
        description: What is being done.
        unit: What is counted.
        leave: Whether the bar stays when the stage is done.
    """
    total = len(items) if isinstance(items, Sized) else None
    named: dict[str, Any] = {"total": total, "desc": description, "unit": f" {unit}", "leave": leave}
    return tqdm(_living(items), **named, **_appearance())


def _living(items: Iterable[T]) -> Iterator[T]:
    for item in items:
        yield item
        alive.advanced()


def bar(
    total: int,
    *,
    description: str | None,
    unit: str,
    initial: int = 0,
    unit_scale: bool = False,
    leave: bool = True,
) -> "tqdm[NoReturn]":
    """`progress` for a bar that the caller advances. Each `update` is a sign of life.

    Args:
        total: Units of the whole stage.
        description: What is being done; None for no bar.
        unit: What is counted.
        initial: Units that were done before.
        unit_scale: Whether to write thousands as k, millions as M.
        leave: Whether the bar stays when the stage is done.
    """
    appearance = _appearance()
    appearance["disable"] |= description is None
    return _LivingBar(
        total=total,
        desc=description,
        unit=f" {unit}",
        initial=initial,
        unit_scale=unit_scale,
        leave=leave,
        **appearance,
    )


class _LivingBar(tqdm):  # type: ignore[type-arg]  # generic in its stubs alone
    def update(self, n: float | None = 1) -> bool | None:
        alive.advanced()
        return super().update(n)


def _appearance() -> dict[str, Any]:
    found: dict[str, Any] = {
        "disable": mode() != "plain" or not _prints(),
        "dynamic_ncols": True,
        "miniters": 1,  # each update looks at the clock, so that no thread has to
    }
    if not sys.stderr.isatty():
        found |= {
            "file": _Lines(sys.stderr),
            "mininterval": FILE_SECONDS,
            "delay": FILE_SECONDS,  # a shorter stage needs no line
            "bar_format": "{desc}: {n_fmt}/{total_fmt}{unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        }
    return found


class _Lines(io.TextIOBase):
    """Turns a bar's carriage returns into line ends, for files and pipes."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        for line in text.replace("\r", "\n").splitlines():
            if line.strip():
                self._stream.write(line.rstrip() + "\n")
        return len(text)

    def flush(self) -> None:
        self._stream.flush()


def _say(kind: str, lines: Iterable[str]) -> None:
    if mode() == "json":
        event(kind, {"text": "\n".join(lines)})
    else:
        tqdm.write("\n".join(lines), file=sys.stdout)
        sys.stdout.flush()


def _prints() -> bool:
    return os.environ.get("RANK", "0") == "0"
