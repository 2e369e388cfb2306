"""A cache of many small shards: seconds to list, load, verify and prune it; docs/reference-cache.md.

    python -m benchmarks.cache_shards [--shards 10000] [--rows 1000000]

So many are left where thousands of ranks are killed before they join their own.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from benchmarks.cache_scale import IDENTITY, hardware
from dpo.data.records import KEY_BYTES
from dpo.reference.prune import prune, verify
from dpo.reference.store import ReferenceStore
from dpo.reference.table import ReferenceRows

T = TypeVar("T")


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=1_000_000)
    options = parser.parse_args()
    print(hardware(), end="\n\n")
    with tempfile.TemporaryDirectory() as folder:
        store = ReferenceStore(Path(folder), IDENTITY)
        store.create()
        fill(store, options.rows, options.shards)
        print(f"| {options.rows:,} rows in {options.shards:,} shards | seconds |\n|---|---|")
        assert len(timed("list", store.shards)) == options.shards
        assert len(timed("load", store.load)) == options.rows
        assert timed("verify", lambda: verify(store)) == options.rows
        assert timed("prune: join them", lambda: prune(store, None, dry_run=False)).kept == options.rows
        assert len(timed("load again", store.load)) == options.rows


def fill(store: ReferenceStore, rows: int, shards: int) -> None:
    """Writes random rows into that many shards."""
    rng = np.random.default_rng(0)
    for part in np.array_split(np.arange(rows), shards):
        keys = np.frombuffer(rng.bytes(KEY_BYTES * len(part)), dtype=f"V{KEY_BYTES}")
        logps, tokens = rng.normal(-100, 30, len(part)), np.full(len(part), 50, dtype=np.int32)
        store.append(ReferenceRows(keys=keys, logps=logps, num_tokens=tokens))


def timed(what: str, work: Callable[[], T]) -> T:
    """The result of some work; prints how long it took."""
    started = time.perf_counter()
    result = work()
    print(f"| {what} | {time.perf_counter() - started:.2f} |", flush=True)
    return result


if __name__ == "__main__":
    main()
