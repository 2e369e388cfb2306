"""Work on a stream of items in several processes, with results in the order of the items.

The processes are started by a server without threads or devices of its own, and end with the process that
started them, also when that is killed.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from multiprocessing.connection import wait
from typing import Any, TypeVar

from dpo.errors import RunFailed
from dpo.pools import in_order

Item = TypeVar("Item")
Result = TypeVar("Result")
State = TypeVar("State")

FEWEST_ITEMS = 4
"""With fewer the start of the processes, which takes seconds, would not pay."""

GRACE_SECONDS = 5.0
"""How long a process goes on after SIGTERM, for its parent to end first."""

_work: Callable[[Any], Any]


def map_in_order(
    work: Callable[[State, Item], Result], state: State, items: Iterable[Item], *, num_workers: int | None
) -> Iterator[Result]:
    """Streams `work(state, item)`; at most a few items per process are read ahead.

    Args:
        work: A function of a module; what it raises is raised here, in the order of the items.
        state: Sent to each process once.
        items: What to work on.
        num_workers: Processes; 1: this one alone. Default: one per core.

    Raises:
        RunFailed: A process was killed.
    """
    num_workers = num_workers or len(os.sched_getaffinity(0))
    stream = iter(items)
    first = list(islice(stream, FEWEST_ITEMS))
    if num_workers == 1 or len(first) < FEWEST_ITEMS:
        yield from (work(state, item) for item in chain(first, stream))
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    pool = ProcessPoolExecutor(num_workers, context, initializer=_start, initargs=(work, state))
    try:
        yield from in_order(pool, _run, chain(first, stream), ahead=2 * num_workers)
    except BrokenProcessPool as error:
        raise RunFailed(
            "a process that tokenizes was killed, perhaps for lack of memory; the same command goes on, with "
            "fewer of them by data.num_workers"
        ) from error


def _start(work: Callable[[State, Item], Result], state: State) -> None:
    global _work
    _work = lambda item: work(state, item)  # noqa: E731
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are as many as the cores
    # Signals reach the whole group. The parent ends the work, and must not take a worker for killed before.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: threading.Timer(GRACE_SECONDS, os._exit, (1,)).start())
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _run(item: Any) -> Any:
    return _work(item)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
