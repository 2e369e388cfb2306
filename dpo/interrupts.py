"""Where a signal may raise an exception.

Python runs a signal's handler between any two instructions of the main thread. An exception that is raised
inside `threading`, in which `concurrent.futures` is written, may leave a lock taken for ever, and the thread
that waits for it hangs. So what shares such locks with other threads runs within `deferred`.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class _Deferred:
    """Blocks of the main thread in which no signal raises; other threads never see one."""

    def __init__(self) -> None:
        self._depth = 0
        self.pending: BaseException | None = None

    @property
    def entered(self) -> bool:
        return self._depth > 0

    def __enter__(self) -> None:
        if _in_main_thread():
            self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not _in_main_thread():
            return
        self._depth -= 1
        if self._depth == 0 and self.pending is not None:
            pending, self.pending = self.pending, None
            raise pending


_blocks = _Deferred()


def deferred() -> _Deferred:
    """A block at whose end, not within it, a signal raises its exception. For short ones: see `dpo.pools`."""
    return _blocks


def interrupt(error: BaseException) -> None:
    """Raises an exception for a signal's handler: here, or at the end of the `deferred` block."""
    if not _blocks.entered:
        raise error
    _blocks.pending = error


@contextmanager
def keyboard() -> Iterator[None]:
    """Within the block Ctrl-C keeps to `deferred`, where Python's own handler is in place."""
    if not _in_main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: interrupt(KeyboardInterrupt()))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _in_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident
