"""Prefetching: a thread builds the next batch while the device works on the current one.

The order of items does not change, and an error in the thread is raised in the loop that asks for the item.
"""

from collections.abc import Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import TypeVar

from dpo.pools import in_order

Item = TypeVar("Item")


def prefetch(items: Iterable[Item]) -> Generator[Item, None, None]:
    """Streams the same items, each computed by a thread while the one before is in use.

    Args:
        items: Computed lazily, such as `map(build, positions)`; only the thread iterates over them.
    """
    end = object()
    source = iter(items)
    worker = ThreadPoolExecutor(1, thread_name_prefix="batches")
    for item in in_order(worker, lambda _: next(source, end), repeat(None), ahead=1):
        if item is end:
            return
        yield item  # type: ignore[misc]  # `end` is no item
