"""Results in order, few ahead; and a signal that comes while a lock of the pool is taken leaves it free."""

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dpo.interrupts import interrupt
from dpo.pools import in_order

ROOT = Path(__file__).parents[2]


class StoppedError(Exception):
    pass


@pytest.fixture
def handled() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, lambda *_: interrupt(StoppedError()))
    yield
    signal.signal(signal.SIGUSR1, before)


def test_results_come_in_the_order_of_the_items() -> None:
    def work(number: int) -> int:
        time.sleep(0.01 * (3 - number % 4))
        return number**2

    assert list(in_order(ThreadPoolExecutor(4), work, range(9), ahead=3)) == [n**2 for n in range(9)]


def test_no_more_than_some_items_are_read_ahead() -> None:
    items = iter(range(100))
    results = in_order(ThreadPoolExecutor(2), lambda item: item, items, ahead=3)
    assert next(results) == 0
    assert next(items) == 4
    results.close()


def test_an_error_comes_after_the_results_before_it_and_ends_the_rest() -> None:
    done = []

    def work(number: int) -> float:
        done.append(number)
        return 1 / (2 - number)

    results = in_order(ThreadPoolExecutor(1), work, range(100), ahead=1)
    assert [next(results), next(results)] == [0.5, 1.0]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert len(done) < 5


@pytest.mark.timeout(60)  # a lock that stays taken
@pytest.mark.parametrize("number", range(12))
def test_a_signal_while_a_lock_is_taken_leaves_it_free(
    number: int, handled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the handler may run between taking a lock and the block that gives it back."""
    enter, taken = threading.Condition.__enter__, 0

    def enter_interrupted(self: threading.Condition) -> bool:
        nonlocal taken
        result = enter(self)
        if threading.get_ident() == threading.main_thread().ident:
            taken += 1
            if taken == number + 1:
                signal.raise_signal(signal.SIGUSR1)
        return result

    threads = threading.active_count()
    monkeypatch.setattr(threading.Condition, "__enter__", enter_interrupted)
    results = in_order(ThreadPoolExecutor(1), lambda item: item, range(100), ahead=1)
    with pytest.raises(StoppedError):
        for _ in results:
            pass
    assert taken > number
    assert threading.active_count() == threads


def test_no_other_module_hands_work_to_a_pool_by_itself() -> None:
    found = {
        path.relative_to(ROOT).as_posix()
        for folder in ("dpo", "data_prep")
        for path in (ROOT / folder).rglob("*.py")
        if ".submit(" in path.read_text()
    }
    assert found == {"dpo/pools.py"}
