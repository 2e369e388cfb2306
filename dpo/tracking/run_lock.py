"""One training per run folder: lock.json, held by the main rank from its start to its end.

The holder touches the file every few seconds. On its own machine the process number says whether it lives;
from another machine the file is watched for a while, so that clocks need not agree. A dead holder's lock is
taken over. A holder that was stopped for so long that another took over exits.
"""

import json
import os
import sys
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from dpo import alive, distributed
from dpo.errors import RunInUse
from dpo.processes import Process, this_process
from dpo.tracking.run_folder import RunFolder

TOUCH_SECONDS = 3.0
DEAD_AFTER_SECONDS = 15.0
"""A lock of another machine that nobody touches for so long belongs to nobody."""
SETTLE_SECONDS = 0.5
"""Two processes that take over the same lock have both written by then; the later one has it."""


@dataclass(frozen=True, kw_only=True)
class Holder(Process):
    """The process that trains in a folder."""

    since: float
    """Seconds since 1970, for people."""
    token: str
    """Unlike that of any other holder."""

    def __str__(self) -> str:
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        return f"process {self.pid} on {self.host}, since {started}"


class RunLock:
    """The lock of this process's run, while it is entered. All ranks must enter; the main one holds it."""

    def __init__(self, folder: RunFolder) -> None:
        """Takes nothing yet."""
        self._folder, self._mine = folder, _this_process()
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._touch, daemon=True)

    def __enter__(self) -> "RunLock":
        """Takes the lock.

        Raises:
            RunInUse: Another process trains there; on all ranks.
        """
        distributed.on_main(self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Gives it back."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
            if holder_of(self._folder) == self._mine:
                with suppress(OSError):
                    self._folder.lock.unlink()

    def _take(self) -> None:
        if not self._folder.may_be_written:
            return  # is refused where the start is decided, and must not be written to
        content = json.dumps(asdict(self._mine), indent=1)
        try:
            self._folder.path.mkdir(parents=True, exist_ok=True)
            try:
                _write(self._folder.lock, content, os.O_EXCL)
            except FileExistsError:
                refuse_if_in_use(self._folder, patient=True)
                _write(self._folder.lock, content, os.O_TRUNC)
                time.sleep(SETTLE_SECONDS)
                if (other := holder_of(self._folder)) != self._mine:
                    raise RunInUse(_in_use(self._folder, other)) from None
        except OSError:
            return  # cannot be written to: said where the folder is tried
        self._thread.start()

    def _touch(self) -> None:
        while not self._ended.wait(TOUCH_SECONDS):
            with suppress(OSError):
                other = holder_of(self._folder)
                if other is not None and other != self._mine:
                    message = (
                        f"{_in_use(self._folder, other)}. This process was stopped for too long: it ends"
                    )
                    print(f"dpo: failed: {message}", file=sys.stderr, flush=True)
                    os._exit(1)
                os.utime(self._folder.lock)


def refuse_if_in_use(folder: RunFolder, *, patient: bool) -> None:
    """Raises RunInUse where a process trains in the folder.

    Args:
        folder: The run folder.
        patient: Watch the lock of a process on another machine until it is touched or counts as dead;
            else such a lock lets everything through.
    """
    holder = holder_of(folder)
    lives = holder.lives() if holder is not None else None
    if lives is None and patient:
        lives = _is_touched(folder.lock)
    if lives:
        raise RunInUse(_in_use(folder, holder_of(folder)))


def holder_of(folder: RunFolder) -> Holder | None:
    """Who holds the lock; None where there is none, or it has just been made."""
    try:
        return Holder(**json.loads(folder.lock.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _is_touched(lock: Path) -> bool:
    """Whether somebody touches a file within the time after which its holder counts as dead."""
    first, until = _touched(lock), time.monotonic() + DEAD_AFTER_SECONDS
    while time.monotonic() < until:
        alive.advanced()  # a wait that ends is no hang, however short the watchdog's patience is
        time.sleep(min(0.5, TOUCH_SECONDS / 2))
        if _touched(lock) != first:
            return lock.is_file()  # it may have been given back
    return False


def _touched(lock: Path) -> int:
    try:
        with lock.open() as file:  # a network file system tells the truth about an open file
            return os.fstat(file.fileno()).st_mtime_ns
    except OSError:
        return 0


def _write(lock: Path, content: str, flag: int) -> None:
    descriptor = os.open(lock, os.O_WRONLY | os.O_CREAT | flag, 0o666)
    with os.fdopen(descriptor, "w") as file:
        file.write(content)


def _in_use(folder: RunFolder, holder: Holder | None) -> str:
    return (
        f"run_dir: {folder.path} is in use by {holder or 'another process'}: wait until it ends, stop it, or "
        "choose another run_dir"
    )


def _this_process() -> Holder:
    return Holder(**asdict(this_process()), since=time.time(), token=uuid.uuid4().hex)
