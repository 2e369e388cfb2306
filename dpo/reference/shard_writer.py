"""Rows of the cache as they are computed -> shards: one at intervals, and few in the end.

A day of a thousand ranks that each write a shard a minute would be 1.5 million files. Each rank joins its own
small shards while it goes on, so that it leaves a handful at any moment, and one small one in the end.
"""

import time
from pathlib import Path

from dpo.reference.store import ReferenceStore
from dpo.reference.table import ReferenceRows

MOST_SMALL_SHARDS = 16
"""With more small shards of its own a rank joins them."""
LARGE_BYTES = 16 << 20
"""A shard of this size is not joined again."""


class ShardWriter:
    """Writes what is added at intervals, and at the end of its block, also if an exception ends it."""

    def __init__(self, store: ReferenceStore, interval: float) -> None:
        """As the class says.

        Args:
            store: The cache.
            interval: Seconds from one shard to the next; a crash loses what was added meanwhile.
        """
        self._store = store
        self._interval = interval
        self._rows: list[ReferenceRows] = []
        self._written_at = time.monotonic()
        self._small: list[Path] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def add(self, rows: ReferenceRows) -> None:
        """Adds rows that are in no shard yet."""
        if len(rows):
            self._rows.append(rows)
        if time.monotonic() - self._written_at >= self._interval:
            self._write()

    def _write(self) -> None:
        if self._rows:
            self._small.append(self._store.append(ReferenceRows.joined(self._rows)))
            self._rows.clear()
        self._written_at = time.monotonic()
        if len(self._small) > MOST_SMALL_SHARDS:
            self._join()

    def _join(self) -> None:
        joined = self._store.join(self._small)
        is_small = joined is not None and joined.stat().st_size < LARGE_BYTES
        self._small = [joined] if joined is not None and is_small else []

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._write()
        if kind is None and len(self._small) > 1:
            self._join()
