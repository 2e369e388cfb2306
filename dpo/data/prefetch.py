"""The next batch is built by a thread while the device works on this one."""

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")


def prefetch(items: Iterable[Item]) -> Generator[Item, None, None]:
    """The same items, with one made ahead by a thread; an error in making one is raised here.

    Args:
        items: Made lazily, such as `map(build, positions)`; only the thread iterates over them.
    """
    end = object()
    source = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="batches") as worker:
        ahead = worker.submit(next, source, end)
        while (item := ahead.result()) is not end:
            ahead = worker.submit(next, source, end)
            yield item  # type: ignore[misc]  # `end` is no item
