"""What checkpoints, metrics and guards cost a run: the seconds spent inside them, against those of its steps.

    python -m benchmarks.overhead                  the numbers of docs/reliability.md

GPT-2 124M on HH pairs through the launcher, two ranks, ZeRO-2, float32 on the CPU. Every call of the parts is
timed in the run itself, on each rank; the slowest rank counts. A cost of a percent cannot be seen as the
difference of two runs: the steps of one run differ by more.
"""

import argparse
import functools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed_processes import SHARED, Settings, child, worker
from benchmarks.speed_work import config_of
from dpo import alive, distributed
from dpo.cli.main import run
from dpo.errors import UserError
from dpo.guards.watchdog import Watchdog
from dpo.tracking.metrics import MetricSums
from dpo.tracking.monitor import Monitor
from dpo.train import loop

WORK = "hh"
RANKS = 2
CHECKPOINT_EVERY = 50
"""Steps between checkpoints for which the share is given."""
PARTS: dict[str, list[tuple[Any, str]]] = {
    "sums, means and the stop flag, over all ranks": [
        (MetricSums, "add_values"),
        (MetricSums, "means"),
        (distributed, "sum_over_ranks"),
    ],
    "metrics.jsonl, TensorBoard, progress bar": [(Monitor, "record"), (Monitor, "advance")],
    "heartbeats and progress for the watchdog": [
        (alive, "step"),
        (Watchdog, "_look_at_this_rank"),
        (Watchdog, "_look_at_others"),
    ],
    "is the loss finite": [(torch.Tensor, "isfinite")],
}
CHECKPOINT, STEP = "a checkpoint", "a step"


class Clock:
    """Seconds of every call of some functions; what one of them calls of the others is not counted twice."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._inside = threading.local()

    def watch(self, part: str, owner: Any, name: str, *, nested: bool = False) -> None:
        """Replaces `owner.name` by a function that is timed."""
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def timed(*arguments: Any, **named: Any) -> Any:
            if getattr(self._inside, "part", False):
                return plain(*arguments, **named)
            self._inside.part = not nested
            started = time.perf_counter()
            try:
                return plain(*arguments, **named)
            finally:
                self._inside.part = False
                self.seconds[part].append(time.perf_counter() - started)

        setattr(owner, name, timed)


def measure(settings: Settings) -> None:
    """Trains on this rank under the clock; rank 0 prints each rank's seconds: a JSON object."""
    clock = Clock()
    clock.watch(STEP, loop, "_advance", nested=True)
    clock.watch(CHECKPOINT, loop, "_save")
    for part, functions in PARTS.items():
        for owner, name in functions:
            clock.watch(part, owner, name)
    run_dir = settings.work(WORK) / "overhead"
    saving = ["--train.checkpoint_every", "2", "--train.keep_last", "1", "--train.checkpoint_async", "false"]
    if status := run([*config_of(settings, WORK, "train", run_dir), *saving]):
        sys.exit(status)
    ranks = distributed.gather_objects(dict(clock.seconds))
    size = sum(path.stat().st_size for path in (run_dir / "checkpoints").rglob("*") if path.is_file())
    if distributed.is_main():
        print(json.dumps({"ranks": ranks, "checkpoint_bytes": size}), flush=True)


def table(ranks: list[dict[str, list[float]]], checkpoint_bytes: int) -> list[str]:
    """A Markdown table.

    Args:
        ranks: Part -> seconds of every call, of each rank.
        checkpoint_bytes: Size of one.
    """

    def slowest(value: Callable[[dict[str, list[float]]], float]) -> float:
        return max(value(seconds) for seconds in ranks)

    step = statistics.median(ranks[0][STEP])
    saves = [max(times) for times in zip(*(seconds[CHECKPOINT] for seconds in ranks), strict=True)]
    save = statistics.median(saves)
    number = len(ranks[0][STEP])
    lines = [
        f"{number} steps, a median of {step:.2f} s each ({min(ranks[0][STEP]):.2f} to "
        f"{max(ranks[0][STEP]):.2f}).\n",
        "| part | seconds | share of the time of steps |",
        "|---|---:|---:|",
        f"| a checkpoint ({checkpoint_bytes / 1e9:.2f} GB), every {CHECKPOINT_EVERY} steps | {save:.2f} "
        f"({min(saves):.2f} to {max(saves):.2f}) a checkpoint | {save / (CHECKPOINT_EVERY * step):.2%} |",
    ]
    total = 0.0
    for part in PARTS:
        each = slowest(lambda seconds, part=part: sum(seconds[part])) / number  # type: ignore[misc]
        total += each
        lines.append(f"| {part} | {each:.5f} a step | {each / step:.3%} |")
    lines.append(f"| all metrics and guards | {total:.5f} a step | {total / step:.3%} |")
    return lines


def main() -> int:
    """Prepares, trains through the launcher, and prints the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pairs_per_step", type=int, default=24)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="d_model; heads are 64 wide")
    parser.add_argument("--hh", default=str(SHARED / "data" / "hh-harmless" / "test.jsonl.gz"))
    parser.add_argument("--tokenizer", default=str(SHARED / "tokenizers" / "gpt2"))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(Settings.read(args.measure))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(
            folder=folder,
            hh=args.hh,
            books="",
            tokenizer=args.tokenizer,
            layers=args.layers,
            width=args.width,
            steps=args.steps,
            pairs_per_step=args.pairs_per_step,
            pairs_per_micro_batch=1,
            max_tokens_per_micro_batch=1024,
            learning_rate=1e-6,
            beta=0.1,
            max_length=512,
            threads=1,
            seed=0,
        )
        path = Path(folder) / "settings.json"
        path.write_text(json.dumps(asdict(settings)))
        try:
            worker(settings, "prepare", WORK)
            launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu.yaml"]
            ranks = ["--num_processes", str(RANKS), "--main_process_port", "0", "-m"]
            arguments = config_of(settings, WORK, "precompute-ref", settings.work(WORK) / "cache_run")
            child(settings, [*launch, *ranks, "dpo", *arguments])
            (found,) = child(settings, [*launch, *ranks, "benchmarks.overhead", "--measure", str(path)])
        except UserError as error:
            print(f"benchmarks.overhead: error: {error}", file=sys.stderr)
            return 2
    print("\n".join(table(**found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
