"""SIGTERM, SIGINT, SIGUSR1 and SIGHUP set a flag; the loop checkpoints and exits at the next step.

A preempted node signals one rank, a scheduler signals every process, and torchelastic forwards what its
agent receives and signals the other ranks once the first one has exited. So the handler saves nothing by
itself: the loop adds the flags of all ranks to a sum that it makes anyway, saves, and all exit together.
"""

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from dpo.errors import StoppedBySignal
from dpo.interrupts import interrupt
from dpo.processes import LAUNCHED

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
REPEATS_WITHIN_SECONDS = 3.0
"""A scheduler signals launcher and rank, and the launcher forwards it: within this time it is one request."""
AT_ONCE = "before the first step: nothing is lost; run the same command again"

Handler = Callable[[int, FrameType | None], None]


class StopRequestedError(Exception):
    """A rank has been asked to stop in the middle of an evaluation; raised on all ranks."""


@contextmanager
def signal_handler(handler: Handler) -> Iterator[None]:
    """Within the block `handler` handles the stopping signals; one that is ignored by the end stays so.

    A SIGHUP that is ignored already, by nohup, stays so too.
    """
    hung_up = () if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else (signal.SIGHUP,)
    handled = (*(number for number in STOPPING if number != signal.SIGHUP), *hung_up)
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, old in before.items():
            if signal.getsignal(number) == handler:
                signal.signal(number, old)


class StopRequests:
    """The stopping signals of this process, while it is entered.

    Until `wait_for_step` is called a signal raises StoppedBySignal at once, as `dpo.interrupts` allows it.
    """

    def __init__(self, at_once: str = AT_ONCE) -> None:
        """Handles nothing yet.

        Args:
            at_once: What StoppedBySignal says after the signal's name.
        """
        self.name: str | None = None
        """The first signal, such as SIGTERM."""
        self._at_once = at_once
        self._at = 0.0
        self._waits = self._ending = False
        self._handled = signal_handler(self._handle)

    def wait_for_step(self) -> None:
        """From now on the loop asks `requested` at each step.

        Raises:
            StoppedBySignal: There was a signal already.
        """
        self._waits = True
        if self.name is not None:
            raise self._stopped(self.name)

    @property
    def requested(self) -> bool:
        """Whether this process has been asked to stop."""
        return self.name is not None

    @property
    def raised_at_once(self) -> bool:
        """Whether a signal has raised StoppedBySignal before the loop asked for it."""
        return self.requested and not self._waits

    def end(self) -> None:
        """The command ends with an error: a signal that comes now must not replace it.

        Torchelastic sends one to the other ranks of a rank that has failed.
        """
        self._ending = True
        if LAUNCHED in os.environ:
            self.ignore_more()  # until the process is gone

    def ignore_more(self) -> None:
        """Everything is saved: further signals come from the launcher, as other ranks exit."""
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> "StopRequests":
        self._handled.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Restores the handlers that were there; signals that are ignored stay so."""
        self._handled.__exit__(None, None, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._ending:
            return
        if self.name is None:
            self.name, self._at = signal.Signals(number).name, now
            if not self._waits:
                interrupt(self._stopped(self.name))
                return
            _say(f"{self.name}: saving after this step; a second signal exits at once, without saving")
        elif now - self._at > REPEATS_WITHIN_SECONDS:
            _say("a second signal: exiting at once")
            os._exit(1)

    def _stopped(self, name: str) -> StoppedBySignal:
        return StoppedBySignal(f"{name} {self._at_once}")


def _say(message: str) -> None:
    """Writes past Python's buffers, which the interrupted code may hold."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\ndpo: {message}\n".encode())
