"""The next batch is built while the device works on this one."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Built = TypeVar("Built")


def prefetch(build: Callable[[Item], Built], items: Iterable[Item]) -> Iterator[Built]:
    """`map(build, items)` with one item built ahead by a thread; an error of `build` is raised here."""
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as worker:
        ahead: Future[Built] | None = None
        for item in items:
            building = worker.submit(build, item)
            if ahead is not None:
                yield ahead.result()
            ahead = building
        if ahead is not None:
            yield ahead.result()
