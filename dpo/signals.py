"""Signals as a wish that the training loop grants at its next step.

A preempted node signals one rank, a scheduler signals everything, torchelastic passes on what its agent gets
and signals the others once a first rank has ended. So a signal only sets a flag; the loop adds the flags of
all ranks to a sum that it makes anyway, saves, and all ranks leave together.
"""

import ctypes
import os
import signal
import sys
import time
from types import FrameType, TracebackType

from dpo.errors import StoppedBySignal

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
REPEATS_WITHIN_SECONDS = 3.0
"""A scheduler signals launcher and rank, and the launcher passes it on: within this time it is one wish."""
PR_SET_PDEATHSIG = 1


class StopRequests:
    """SIGTERM, SIGINT and SIGUSR1 of this process, from `with` on.

    Until `wait_for_step` is called a signal ends the command at once: nothing is to be saved yet.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        """The first signal, such as SIGTERM."""
        self._at = 0.0
        self._patient = False

    def wait_for_step(self) -> None:
        """From now on somebody asks `requested` at each step.

        Raises:
            StoppedBySignal: There was a signal already.
        """
        self._patient = True
        if self.name is not None:
            raise _before_the_first_step(self.name)

    @property
    def requested(self) -> bool:
        """Whether this process has been asked to stop."""
        return self.name is not None

    def ignore_more(self) -> None:
        """All is saved: what comes now is the launcher, which signals the ranks that end a little later."""
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)

    def __enter__(self) -> "StopRequests":
        self._before = {number: signal.signal(number, self._handle) for number in STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Puts back the handlers that were there; signals that are ignored stay so."""
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name, self._at = signal.Signals(number).name, now
            if not self._patient:
                raise _before_the_first_step(self.name)
            _say(f"{self.name}: saving after this step; a second signal ends at once, without saving")
        elif now - self._at > REPEATS_WITHIN_SECONDS:
            _say("a second signal: ending at once")
            os._exit(1)


def end_with_launcher() -> None:
    """Asks the kernel for a SIGTERM when the launcher dies, so that no rank is left behind (Linux only)."""
    if sys.platform == "linux" and "TORCHELASTIC_RUN_ID" in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _before_the_first_step(name: str) -> StoppedBySignal:
    return StoppedBySignal(f"{name} before a step was made: nothing is lost; the same command goes on")


def _say(message: str) -> None:
    """Without Python's buffers, which the code that was interrupted may hold."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"\ndpo: {message}\n".encode())
