"""How the reference cache scales: seconds and memory to load and join it, and bytes on disk.

    python -m benchmarks.cache_scale [--pairs 1e4 1e5 1e6 1e7] [--figure FILE.png]

Every stored value is a function of its key, so each measurement also proves that every sequence got its own
row. Each runs in a fresh process, after the files were dropped from the page cache. Linux only.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from benchmarks.cache_scale_report import MAX_MIB, MAX_SECONDS, Measurement, draw, print_scale, print_table
from dpo.data.records import KEY_BYTES
from dpo.reference.identity import IDENTITY_VERSION, ReferenceIdentity
from dpo.reference.store import ReferenceStore
from dpo.reference.table import Keys, ReferenceRows

SEED = 0
PAIRS = (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000, 10_000_000)
SHARD_ROWS = 500_000
REPEATS = 3  # fresh processes per size; times are medians, memory is the maximum
MAX_BYTES = 40.0
LIMITED_PAIRS = 10_000_000  # the limits hold up to this many

DISK_SEQUENCES = 1_000_000
TOKENS = (20, 81)  # completion tokens of the rows with log-probs per token: 50 on average
SCALES = np.array([100, 10, 1, 0.001], dtype=np.float32) / np.float32(2**32)
"""A log-prob is a sum of float32 numbers of different magnitudes, so that its low bits compress as badly as
those of real ones."""

ROOT = Path(__file__).parents[1]
IDENTITY = ReferenceIdentity(
    version=IDENTITY_VERSION, weights={}, adapter={}, code={}, config={"benchmark": SEED}, dtype="float32"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the tables, draws the figure; 1 if a limit is exceeded."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache_scale", description=__doc__)
    parser.add_argument("--pairs", "--rows", type=float, nargs="+", default=PAIRS, help="sizes to measure")
    parser.add_argument("--figure", type=Path, help="where to draw the figure (PNG)")
    parser.add_argument("--disk_sequences", type=float, default=DISK_SEQUENCES, help="rows of the disk table")
    parser.add_argument("--repeats", type=int, default=REPEATS, help="fresh processes per size")
    parser.add_argument(
        "--measure", type=Path, help=argparse.SUPPRESS
    )  # what the fresh process is started with
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(asdict(measure(options.measure))))
        return 0
    print(hardware(), end="\n\n")
    measured = [measure_size(int(pairs), options.repeats) for pairs in options.pairs]
    print_scale(measured)
    disk = disk_table(int(options.disk_sequences))
    if options.figure:
        draw(measured, options.figure)
    return 0 if within_limits(measured, disk) else 1


def hardware() -> str:
    """CPU model, cores, memory, Python and date, as one line."""
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    name = names[0].partition(":")[2].strip() if names else platform.machine()
    return (
        f"Hardware: {name}, {os.cpu_count()} cores, {memory:.0f} GiB. "
        f"Python {platform.python_version()}, numpy {np.__version__}. Date: {date.today()}. Seed: {SEED}."
    )


def random_keys(number: int) -> Keys:
    """(N,) V16; random bytes, distributed like hashes."""
    return np.frombuffer(np.random.default_rng(SEED).bytes(number * KEY_BYTES), dtype=f"V{KEY_BYTES}")


def rows_of(keys: Keys) -> ReferenceRows:
    """The rows that belong to (N,) keys: sums of -111 to 0 nats, 20 to 319 completion tokens."""
    words = np.ascontiguousarray(keys).view(np.uint32).reshape(-1, 4)
    return ReferenceRows(
        keys=keys,
        logps=-(words.astype(np.float32) * SCALES).astype(np.float64).sum(axis=1),
        num_tokens=(words[:, 3] % 300 + 20).astype(np.int32),
    )


def rows_with_tokens(keys: Keys) -> ReferenceRows:
    """Rows of (N,) keys with random token log-probs, and their sums."""
    rng = np.random.default_rng(SEED)
    lengths = rng.integers(*TOKENS, len(keys), dtype=np.int32)
    token_logps = -rng.standard_exponential(int(lengths.sum()), dtype=np.float32)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    logps = np.add.reduceat(token_logps.astype(np.float64), starts)
    return ReferenceRows(keys=keys, logps=logps, num_tokens=lengths, token_logps=token_logps)


def measure_size(pairs: int, repeats: int) -> Measurement:
    """Writes a cache and its data's keys, and measures fresh processes; times are medians."""
    with tempfile.TemporaryDirectory(prefix="cache_scale_") as name:
        folder = Path(name)
        write_world(folder, pairs)
        runs = [measure_in_fresh_process(folder) for _ in range(repeats)]
    return Measurement(
        pairs=pairs,
        load=median(run.load for run in runs),
        join=median(run.join for run in runs),
        before_mib=median(run.before_mib for run in runs),
        peak_mib=max(run.peak_mib for run in runs),
    )


def write_world(folder: Path, pairs: int) -> None:
    """keys.npy in the order of the data, and a cache with the same keys in another order."""
    keys = random_keys(2 * pairs)
    np.save(folder / "keys.npy", keys)
    order = np.random.default_rng(SEED + 1).permutation(len(keys))
    store = ReferenceStore(folder / "cache", IDENTITY)
    store.create()
    for start in range(0, len(keys), SHARD_ROWS):
        store.append(rows_of(keys[order[start : start + SHARD_ROWS]]))


def measure_in_fresh_process(folder: Path) -> Measurement:
    """`measure` in a fresh process, with files that are not in the page cache."""
    drop_from_page_cache(folder)
    command = [sys.executable, "-m", "benchmarks.cache_scale", "--measure", str(folder)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return Measurement(**json.loads(done.stdout))


def drop_from_page_cache(folder: Path) -> None:
    """Makes the next reader read every file from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path) -> Measurement:
    """Loads and joins as `dpo.reference.values` does, in this process, and checks every value.

    Raises:
        RuntimeError: A sequence was not found, or got the log-prob of another.
    """
    keys = np.load(folder / "keys.npy", mmap_mode="r")
    before = resident_mib("VmRSS")
    started = time.perf_counter()
    table = ReferenceStore(folder / "cache", IDENTITY).load()
    loaded = time.perf_counter()
    rows = table.index.find(keys)
    logps = table.logps[rows]
    joined = time.perf_counter()
    peak = resident_mib("VmHWM")
    if (rows < 0).any() or len(table) != len(keys):
        raise RuntimeError(f"{int((rows < 0).sum())} keys not found; {len(table)} rows for {len(keys)} keys")
    check_values(keys, logps, table.num_tokens[rows])
    return Measurement(
        pairs=len(keys) // 2, load=loaded - started, join=joined - loaded, before_mib=before, peak_mib=peak
    )


def check_values(keys: Keys, logps: npt.NDArray[np.float64], num_tokens: npt.NDArray[np.int32]) -> None:
    """RuntimeError unless every value is, bit for bit, the one that belongs to its key."""
    for start in range(0, len(keys), SHARD_ROWS):
        part = slice(start, start + SHARD_ROWS)
        expected = rows_of(keys[part])
        wrong = (logps[part] != expected.logps) | (num_tokens[part] != expected.num_tokens)
        if wrong.any():
            raise RuntimeError(f"{int(wrong.sum())} of the sequences from {start} on have values of others")


def resident_mib(name: str) -> float:
    """VmRSS (now) or VmHWM (peak) of this process, in MiB.

    Not ru_maxrss, which survives exec: a child's is at least its parent's memory at the start of the child.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{name}:"))


def disk_table(sequences: int) -> dict[str, float]:
    """Bytes per sequence on disk, by layout; prints them."""
    keys = random_keys(sequences)
    plain, with_tokens = rows_of(keys), rows_with_tokens(keys)
    mean = with_tokens.num_tokens.mean()
    found = {
        "without token log-probs, 1 shard": bytes_per_sequence(plain, 1),
        "without token log-probs, 100 shards": bytes_per_sequence(plain, 100),
        f"with token log-probs ({mean:.0f} tokens on average), 1 shard": bytes_per_sequence(with_tokens, 1),
    }
    print_table(
        (f"{sequences:,} sequences", "bytes per sequence"),
        [(layout, f"{size:.1f}") for layout, size in found.items()],
    )
    return found


def bytes_per_sequence(rows: ReferenceRows, num_shards: int) -> float:
    """Size of a cache's folder divided by its number of rows."""
    with tempfile.TemporaryDirectory(prefix="cache_scale_") as name:
        store = ReferenceStore(Path(name), IDENTITY)
        store.create()
        for numbers in np.array_split(np.arange(len(rows)), num_shards):
            mask = np.zeros(len(rows), dtype=bool)
            mask[numbers] = True
            store.append(rows.where(mask))
        return sum(path.stat().st_size for path in store.path.iterdir()) / len(rows)


def within_limits(measured: Sequence[Measurement], disk: dict[str, float]) -> bool:
    """Whether time, memory and bytes per sequence are within the limits; prints the answer."""
    worst_bytes = max(size for layout, size in disk.items() if layout.startswith("without"))
    kept = worst_bytes <= MAX_BYTES
    print(f"Bytes per sequence without tokens: {worst_bytes:.1f}, limit {MAX_BYTES:.0f}.")
    for one in measured:
        if one.pairs <= LIMITED_PAIRS:
            kept &= one.total <= MAX_SECONDS and one.peak_mib <= MAX_MIB
    largest = max(measured, key=lambda one: one.pairs)
    print(
        f"{largest.pairs:,} pairs: {largest.total:.1f} s, limit {MAX_SECONDS:.0f} s; peak "
        f"{largest.peak_mib:,.0f} MiB, limit {MAX_MIB:,.0f} MiB (limits for up to {LIMITED_PAIRS:,} pairs)."
    )
    print(f"Limits: {'kept' if kept else 'EXCEEDED'}.")
    return kept


if __name__ == "__main__":
    sys.exit(main())
