"""A signal's exception waits for the end of a block that shares locks with other threads."""

import signal
import threading
from collections.abc import Iterator

import pytest

from dpo.interrupts import deferred, interrupt, keyboard


class StoppedError(Exception):
    pass


@pytest.fixture(autouse=True)
def handled() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, lambda *_: interrupt(StoppedError()))
    yield
    signal.signal(signal.SIGUSR1, before)


def test_outside_a_block_the_exception_is_raised_where_the_signal_comes() -> None:
    with pytest.raises(StoppedError):
        signal.raise_signal(signal.SIGUSR1)


def test_in_a_block_it_is_raised_at_the_end_of_the_outermost_one_and_once() -> None:
    reached = []

    def work() -> None:
        with deferred():
            with deferred():
                signal.raise_signal(signal.SIGUSR1)
                reached.append("inner")
            reached.append("outer")

    with pytest.raises(StoppedError):
        work()
    assert reached == ["inner", "outer"]
    with deferred():
        pass


def test_it_is_raised_where_the_block_ends_with_an_error_too() -> None:
    def work() -> None:
        with deferred():
            signal.raise_signal(signal.SIGUSR1)
            raise ValueError

    with pytest.raises(StoppedError) as raised:
        work()
    assert isinstance(raised.value.__context__, ValueError)


def test_a_block_of_another_thread_holds_back_nothing() -> None:
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with deferred():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait(10)
    try:
        with pytest.raises(StoppedError):
            signal.raise_signal(signal.SIGUSR1)
    finally:
        leave.set()
        thread.join()


def test_the_keyboard_waits_too_and_gets_its_handler_back() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    reached = []

    def work() -> None:
        with keyboard(), deferred():
            signal.raise_signal(signal.SIGINT)
            reached.append("inner")

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert reached
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a shell's background job
        with keyboard():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
