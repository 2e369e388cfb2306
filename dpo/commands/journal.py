"""Commands run one after the other, each once: a journal records what was done, and by which command."""

import hashlib
import json
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from dpo import terminal
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.files import remove_abandoned, write_file
from dpo.guards.signals import signal_handler


@dataclass(frozen=True, slots=True, kw_only=True)
class Journal:
    """done.json of a sweep or a study: product -> digest of what made it."""

    file: Path
    """Written after each command that is done; its folder exists."""

    def once(self, name: str, command: Sequence[str], product: Path, settings: Any = None) -> bool:
        """Starts a command unless it was done already, by the same words and settings, and left its product.

        Args:
            name: What messages call it.
            command: Program and arguments.
            product: A file that the command writes last.
            settings: What else it depends on, as JSON; such as the contents of a configuration it reads.

        Returns:
            Whether it was started.

        Raises:
            UserError: It ended with status 2.
            StoppedBySignal: It was stopped; finished parts are kept.
            RunFailed: It failed, or left no product.
        """
        if self.is_done(command, product, settings):
            terminal.note(f"{product.parent}: {name} is done")
            return False
        remove_abandoned(self.file.parent)
        start(name, command)
        if not product.is_file():
            raise RunFailed(f"{name} exited with status 0 and left no {product}")
        done = self._read() | {str(product): _digest(command, settings)}
        write_file(self.file, json.dumps(done, indent=2))
        return True

    def is_done(self, command: Sequence[str], product: Path, settings: Any = None) -> bool:
        """Whether `once` would not start the command."""
        return self._read().get(str(product)) == _digest(command, settings) and product.is_file()

    def _read(self) -> dict[str, str]:
        return dict(json.loads(self.file.read_text())) if self.file.is_file() else {}


def _digest(command: Sequence[str], settings: Any) -> str:
    made_by = json.dumps([settings, list(command)], sort_keys=True, default=str)
    return hashlib.sha256(made_by.encode()).hexdigest()


def start(name: str, command: Sequence[str]) -> None:
    """Runs a command to its end; a signal is forwarded to it, and its exit status becomes an exception.

    Raises:
        UserError: It ended with status 2.
        StoppedBySignal: It ended with status 3.
        RunFailed: It ended with another status than 0.
    """
    terminal.note(f"\n== {shlex.join(command)}")
    # In its own process group: a terminal's Ctrl-C reaches it once, through here.
    with subprocess.Popen(command, start_new_session=True) as child:

        def pass_on(number: int, _: FrameType | None) -> None:
            child.send_signal(number)

        with signal_handler(pass_on):
            status = child.wait()
    said = f"{name} exited with status {status}; run the same command again: finished parts are kept"
    if status == 2:
        raise UserError(said)
    if status == 3:
        raise StoppedBySignal(said)
    if status:
        raise RunFailed(said)
