"""How long parts of a step take on this rank's device, without waiting for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of the blocks that it is around: the GPU's where there is one, else the wall clock's.

    Between two reads of `seconds` the device must have been waited for; nothing here waits.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Counts the block."""
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def seconds(self) -> float:
        """Of all blocks, once the device has done them."""
        return self._seconds + sum(float(begin.elapsed_time(end)) for begin, end in self._events) / 1000
