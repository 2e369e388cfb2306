"""How long training stands still for a checkpoint, written in the foreground and in the background.

    python -m benchmarks.checkpoint                the numbers of docs/reliability.md

A model of the shape of GPT-2 124M with random weights, two ranks with ZeRO-2 through the launcher, float32 on
the CPU. Both ways take turns in one run; steps are made while a thread writes. The slowest rank counts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from dpo import distributed
from dpo.config import ModelConfig, OptimizationConfig
from dpo.data.trees import sequence_batch
from dpo.engine import world
from dpo.engine.engine import Engine
from dpo.model.load import load_model
from dpo.tracking.run_folder import RunFolder
from dpo.train.checkpoint import Progress, begin_checkpoint, prepare_checkpoints
from dpo.train.pending import PendingCheckpoint

RANKS = 2


def measure(folder: Path, repeats: int) -> None:
    """Saves in turns on this rank; rank 0 prints each rank's seconds: a JSON object."""
    config = ModelConfig(name_or_path=str(folder / "model"), dtype="float32")
    engine = Engine(world.start(config), load_model(config), config, OptimizationConfig())
    run = RunFolder(folder / "run")
    run.path.mkdir(exist_ok=True)
    distributed.on_main(lambda: prepare_checkpoints(run, resumed=False))
    seconds: dict[str, list[float]] = {
        name: [] for name in ("step", "foreground", "begin", "finish", "during")
    }

    def timed(name: str, work: Callable[[], object]) -> None:
        distributed.barrier()
        started = time.perf_counter()
        work()
        seconds[name].append(time.perf_counter() - started)

    def begin(number: int, *, in_background: bool) -> PendingCheckpoint:
        return begin_checkpoint(engine, Progress(step=number), run, 1, {}, in_background=in_background)

    step(engine)
    for repeat in range(repeats):
        timed("step", lambda: step(engine))
        timed("foreground", lambda: begin(2 * repeat, in_background=False).finish())  # noqa: B023
        pending: list[PendingCheckpoint] = []
        timed("begin", lambda: pending.append(begin(2 * repeat + 1, in_background=True)))  # noqa: B023
        while distributed.any_rank(not pending[0].written):
            timed("during", lambda: step(engine))
        timed("finish", pending[0].finish)
        pending[0].settle()
    size = sum(path.stat().st_size for path in run.checkpoints.rglob("*") if path.is_file())
    ranks = distributed.gather_objects(seconds)
    if distributed.is_main():
        print(json.dumps({"ranks": ranks, "bytes": size}), flush=True)


def step(engine: Engine) -> None:
    """One small optimizer step, so that the optimizer has moments."""
    ids = np.arange(64, dtype=np.int32)
    engine.accumulate(-engine.score(sequence_batch([(ids, ids)])).sum() / 64, last=True)
    engine.update(1e-6)


def table(ranks: list[dict[str, list[float]]], num_bytes: int) -> list[str]:
    """A Markdown table of medians over the repeats of the slowest rank."""

    def median(*names: str) -> float:
        slowest = (
            [max(times) for times in zip(*(rank[name] for rank in ranks), strict=True)] for name in names
        )
        return float(sum(statistics.median(seconds) for seconds in slowest))

    foreground, background = median("foreground"), median("begin", "finish")
    return [
        f"A checkpoint of {num_bytes / 1e9:.2f} GB; a small step takes {median('step'):.2f} s, and "
        f"{median('during'):.2f} s while a thread writes.\n",
        "| written | training stands still |",
        "|---|---:|",
        f"| in the foreground | {foreground:.2f} s |",
        f"| in the background | {background:.2f} s ({median('begin'):.2f} to copy, {median('finish'):.2f} "
        f"to publish): {foreground / background:.1f} times shorter |",
    ]


def main() -> int:
    """Makes a model, measures through the launcher, and prints the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.checkpoint", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="d_model; heads are 64 wide")
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(Path(args.measure), args.repeats)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        shape = GPT2Config(
            vocab_size=args.vocabulary, n_layer=args.layers, n_embd=args.width, n_head=args.width // 64
        )
        torch.manual_seed(0)
        GPT2LMHeadModel(shape).save_pretrained(Path(folder) / "model")
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu.yaml"]
        more = ["--num_processes", str(RANKS), "--main_process_port", "0", "-m", "benchmarks.checkpoint"]
        arguments = ["--measure", folder, "--repeats", str(args.repeats)]
        done = subprocess.run([*launch, *more, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"ranks"')))
    print("\n".join(table(found["ranks"], found["bytes"])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
