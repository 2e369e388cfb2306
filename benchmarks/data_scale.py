"""Time and memory of `dpo data`'s description at many pairs, on synthetic token ids; docs/data-report.md.

python -m benchmarks.data_scale --pairs 1000000
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from dpo.data.dataset import TokenizedDataset, map_dataset
from dpo.data.records import KEY_BYTES
from dpo.evaluate.described_data import TRAINING, describe

TOKENS_PER_WRITE = 1 << 24
LENGTHS = ((20, 200), (20, 300), (20, 300))
"""Tokens of prompts, chosen and rejected completions: uniform between."""


def main() -> None:
    """Writes a data set, describes it, and prints what that took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=1_000_000)
    pairs = parser.parse_args().pairs
    with tempfile.TemporaryDirectory() as folder:
        data = written(Path(folder), pairs)
        logps = np.random.default_rng(1).normal(-200, 30, 2 * pairs)
        before, started = _anonymous_bytes(), time.perf_counter()
        described = describe({TRAINING: data}, {TRAINING: logps})
        seconds = time.perf_counter() - started
    mapped = 4 * len(data.tokens) / 1e9
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{pairs:,} pairs, {len(data.tokens) / 1e6:,.0f}M tokens: {seconds:.1f} s; peak {peak:.2f} GB, of "
        f"which {mapped:.2f} GB are mapped token ids and {before / 1e9:.2f} GB were held before"
    )
    assert described.splits[TRAINING].facts.pairs == pairs


def written(folder: Path, pairs: int) -> TokenizedDataset:
    """A data set of plain pairs with random ids, in the files that `write_dataset` writes."""
    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(low, high, pairs) for low, high in LENGTHS], axis=1).ravel()
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    with (folder / "tokens.bin").open("wb") as file:
        for start in range(0, int(offsets[-1]), TOKENS_PER_WRITE):
            size = min(TOKENS_PER_WRITE, int(offsets[-1]) - start)
            file.write(rng.integers(0, 50_000, size, dtype=np.int32).tobytes())
    arrays = {
        "segment_offsets": offsets,
        "group_segments": np.arange(0, 3 * pairs + 1, 3),
        "pairs": np.tile(np.array([[0, 1]], dtype=np.int32), (pairs, 1)),
        "group_pairs": np.arange(pairs + 1),
        "margins": np.full(pairs, np.nan),
        "keys": np.frombuffer(rng.bytes(2 * pairs * KEY_BYTES), dtype=f"V{KEY_BYTES}"),
    }
    for name, values in arrays.items():
        np.save(folder / f"{name}.npy", values)
    counts = {"largest_id": 49_999, "groups": pairs, "pairs": pairs, "tokens": int(offsets[-1])}
    (folder / "counts.json").write_text(json.dumps(counts))
    (folder / "sources.json").write_text("[]")
    return map_dataset(folder, "synthetic")


def _anonymous_bytes() -> int:
    """Memory of this process that no file backs."""
    status = Path("/proc/self/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("RssAnon")]
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
