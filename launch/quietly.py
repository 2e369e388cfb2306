"""Runs the launcher with what it says itself in a file: the ranks keep the terminal.

    quietly.py LOG MODULE ARGUMENT ...

A launcher that is interrupted, or whose rank fails, writes forty lines of its own tracebacks around the one
message that says why. They go to LOG. What its threads pass on from ranks (--tee) is shown as before, and the
ranks themselves are processes with an error output of their own. Uses the standard library alone.
"""

import io
import runpy
import sys
import threading
from pathlib import Path
from typing import TextIO


class _OwnWords(io.TextIOBase):
    """An error output: what the main thread writes goes to a log, what others write is shown."""

    def __init__(self, log: TextIO, shown: TextIO) -> None:
        self._log, self._shown = log, shown

    def write(self, text: str) -> int:
        return self._here().write(text)

    def flush(self) -> None:
        self._here().flush()

    def fileno(self) -> int:
        return self._shown.fileno()

    def isatty(self) -> bool:
        return self._shown.isatty()

    def _here(self) -> TextIO:
        return self._log if threading.current_thread() is threading.main_thread() else self._shown


def main(log: str, module: str) -> None:
    """Runs a module as `python -m` does, in this process."""
    sys.path[0] = ""
    sys.argv[:] = [module, *sys.argv[3:]]
    own = Path(log).open("a", buffering=1)  # noqa: SIM115  (the interpreter's last words go there too)
    sys.stderr = _OwnWords(own, sys.stderr)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
