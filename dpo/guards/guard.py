"""How a training command ends: on a signal after a checkpoint, or with the reason that stopped the run.

Entered around everything that `train` and `sft` do. An error that another rank caused becomes that rank's
reason, so that every rank reports the same one.
"""

from contextlib import ExitStack
from types import TracebackType

from dpo import distributed
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.guards.signals import StopRequestedError, StopRequests, end_with_launcher
from dpo.guards.watchdog import Watchdog
from dpo.tracking.run_folder import RunFolder
from dpo.tracking.run_lock import RunLock


class Guard:
    """Stop signals, the watchdog and the run folder's lock of one command."""

    def __init__(self, folder: RunFolder, command: str, stuck_after_seconds: float) -> None:
        """Watches nothing before it is entered; the process group must be up by now.

        Args:
            folder: Where stacks and exit.json go, and what is locked.
            command: For exit.json.
            stuck_after_seconds: Longest time without progress.
        """
        self.stop = StopRequests()
        self._watchdog = Watchdog(folder, command, stuck_after_seconds)
        self._lock = RunLock(folder)
        self._entered = ExitStack()

    def progress(self, doing: str) -> None:
        """Tells the watchdog that this rank advances.

        Args:
            doing: What comes now, such as `step 7`.
        """
        self._watchdog.progress(doing)

    def may_continue(self, doing: str) -> None:
        """`progress` for an evaluation, which a signal ends before its end. All ranks must call it.

        Raises:
            StopRequestedError: A rank has been asked to stop; on all ranks.
        """
        self.progress(doing)
        if distributed.any_rank(self.stop.requested):
            raise StopRequestedError

    def __enter__(self) -> "Guard":
        end_with_launcher()
        with ExitStack() as entered:
            entered.enter_context(self.stop)
            entered.enter_context(self._watchdog)
            entered.enter_context(self._lock)
            self._entered = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Agrees with the other ranks on the reason of an error, and raises it."""
        with self._entered:
            if isinstance(error, UserError | StoppedBySignal | RunFailed):
                self._watchdog.publish_end(error)
            elif isinstance(error, Exception):
                reason = self._watchdog.explain(error)
                if reason is not error:
                    raise reason from error
