"""Results of a pool of threads or processes in the order of the items; a stop signal leaves no lock taken."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from queue import SimpleQueue
from typing import TypeVar

from dpo.interrupts import deferred

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    pool: Executor, work: Callable[[Item], Result], items: Iterable[Item], *, ahead: int, wait: bool = True
) -> Generator[Result, None, None]:
    """Streams `work(item)`, and shuts the pool down in the end; what has not begun by then is cancelled.

    Args:
        pool: Used by nobody else.
        work: What it raises is raised here, in the order of the items.
        items: Read by the thread that asks for results.
        ahead: How many further items are given to the pool before a result is asked for.
        wait: Whether to wait in the end for what has begun.
    """
    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            with deferred():
                begun.append(pool.submit(work, item))
            if len(begun) > ahead:
                yield _result_of(begun.popleft())
        while begun:
            yield _result_of(begun.popleft())
    finally:
        with deferred():
            pool.shutdown(wait=wait, cancel_futures=True)


def _result_of(future: "Future[Result]") -> Result:
    """Waits in C, where a signal may end the wait: `Future.result` waits with locks of `threading`."""
    done: SimpleQueue[Future[Result]] = SimpleQueue()
    with deferred():
        future.add_done_callback(done.put)
    finished = done.get()
    with deferred():
        return finished.result()
