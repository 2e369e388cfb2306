"""Times parts of a step on this rank's device, without waiting for it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Adds up the time of blocks: GPU time where there is a GPU, else wall-clock time.

    The caller must have synchronized with the device before it reads `seconds`.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Times the block."""
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
        """Seconds of all blocks, once the device has finished them."""
        return self._seconds + sum(float(begin.elapsed_time(end)) for begin, end in self._events) / 1000
