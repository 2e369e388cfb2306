"""How a command ends: on a signal after a checkpoint, or with the reason that stopped the run.

Entered around all that `train`, `sft` and `precompute-ref` do. An error that another rank caused becomes that
rank's reason, so that every rank reports the same one; so does the signal that the launcher sends to the rest
when a rank has failed.
"""

import errno
import shutil
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from pathlib import Path
from types import TracebackType

from dpo import alive, distributed
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.guards.signals import AT_ONCE, StopRequestedError, StopRequests
from dpo.guards.watchdog import Watchdog
from dpo.tracking.run_folder import RunFolder
from dpo.tracking.run_lock import RunLock

OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}
"""What a disk answers, as opposed to what we ask wrongly."""


class Guard:
    """Stop signals, the watchdog and the run folder's lock of one command."""

    def __init__(
        self,
        folder: RunFolder,
        command: str,
        stuck_after_seconds: float,
        *,
        at_once: str = AT_ONCE,
        exclusive: bool = True,
    ) -> None:
        """Watches nothing before it is entered.

        Args:
            folder: Where stacks and exit.json go, and what is locked.
            command: For exit.json.
            stuck_after_seconds: Longest time without progress.
            at_once: What is said of a signal before the first step.
            exclusive: Whether no other process may train in the folder meanwhile.
        """
        self._folder = folder
        self.stop = StopRequests(at_once)
        self._watchdog = Watchdog(folder, command, stuck_after_seconds)
        self._lock: AbstractContextManager[object] = RunLock(folder) if exclusive else nullcontext()
        self._entered = ExitStack()

    def may_continue(self, doing: str) -> None:
        """`alive.step` for an evaluation, which a signal ends before its end. All ranks must call it.

        Raises:
            StopRequestedError: A rank has been asked to stop; on all ranks.
        """
        alive.step(doing)
        if distributed.any_rank(self.stop.requested):
            raise StopRequestedError

    def __enter__(self) -> "Guard":
        """Joins the process group; the watchdog sees a rank that never does, and a signal ends the process.

        Raises:
            RunInUse: Another process trains in the folder; on all ranks.
        """
        with ExitStack() as entered:
            entered.enter_context(self._watchdog)
            distributed.start()
            self._watchdog.listen()
            entered.enter_context(self.stop)
            try:
                entered.enter_context(self._lock)  # all ranks take it together
            except Exception as error:
                self._end_with(error)
                raise
            self._entered = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Agrees with the other ranks on the reason of an error, and raises it."""
        with self._entered:
            if error is not None:
                self._end_with(error)

    def _end_with(self, error: BaseException) -> None:
        """Raises another rank's reason in place of an error of this one; returns where it is its own."""
        self.stop.end()
        by_launcher = isinstance(error, StoppedBySignal) and self.stop.raised_at_once
        if isinstance(error, UserError | StoppedBySignal | RunFailed) and not by_launcher:
            self._watchdog.publish_end(error)
        elif isinstance(error, Exception):
            reason = self._watchdog.explain(_without_traceback(error, self._folder))
            if reason is not error:
                raise reason from error


def _without_traceback(error: Exception, folder: RunFolder) -> Exception:
    """A disk's error as one line: which file could not be written, why, and what the run has kept."""
    if not isinstance(error, OSError) or error.errno not in OF_THE_DISK:
        return error
    file, free = Path(str(error.filename or folder.path)), ""
    with suppress(OSError):
        place = next(path for path in (file, *file.absolute().parents) if path.is_dir())
        free = f"; {shutil.disk_usage(place).free / 1e6:,.1f} MB are free there"
    kept = folder.newest_checkpoint
    return UserError(
        f"{file}: {error.strerror}{free}: make room or repair the disk, and run the same command again "
        + (f"to resume from {kept}" if kept else "to start again: there is no checkpoint yet")
    )
