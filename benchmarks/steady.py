"""Whether a long run needs more memory with time: 1,000 steps of a tiny run, with all that a run does.

    python -m benchmarks.steady --figure docs/figures/steady_memory.png    the numbers of docs/reliability.md

One process on the CPU; an evaluation every 50 steps and a checkpoint every 20, written in the background. The
resident memory is read after every step.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt

from benchmarks.families import configuration, make_tokenizer, write_pairs
from benchmarks.tiny_models import tiny_model
from dpo.commands.precompute_ref import precompute_ref
from dpo.commands.train import build_session
from dpo.commands.training import run_training
from dpo.config import Config
from dpo.guards.guard import Guard
from dpo.train.session import Session

EVALUATE_EVERY, CHECKPOINT_EVERY, PAIRS = 50, 20, 40
FIRST = 0.2
"""Share of the run that is not judged: caches of allocator and libraries fill."""
Measured = npt.NDArray[np.float64]


def measure(folder: Path, num_steps: int) -> Measured:
    """(num_steps,) resident megabytes after each step."""
    tiny_model("gpt2").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    write_pairs(folder / "pairs.jsonl", PAIRS)
    config = configuration(folder)
    train = replace(
        config.train,
        pairs_per_step=4,
        num_epochs=num_steps,
        max_steps=num_steps,
        evaluate_every=EVALUATE_EVERY,
        checkpoint_every=CHECKPOINT_EVERY,
        checkpoint_async=True,
    )
    config = replace(config, train=train, data=replace(config.data, test=config.data.train))
    precompute_ref(config)
    seen: list[float] = []

    def build(config: Config, guard: Guard) -> Session:
        session = build_session(config, guard)
        plain = session.engine.update

        def update(rate: float) -> float:
            norm = plain(rate)
            seen.append(resident_megabytes())
            return norm

        session.engine.update = update  # type: ignore[assignment, method-assign]
        return session

    run_training("train", config, build)
    return np.array(seen)


def resident_megabytes() -> float:
    """Resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def growth(measured: Measured) -> float:
    """Megabytes per 1,000 steps of a straight line through what is judged."""
    steps = np.arange(len(measured))
    judged = steps >= FIRST * len(measured)
    slope: float = np.polyfit(steps[judged], measured[judged], 1)[0]
    return 1000 * slope


def main() -> int:
    """Measures, prints, and draws."""
    parser = argparse.ArgumentParser(prog="benchmarks.steady", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--figure", type=Path, help="PNG to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(Path(folder), options.steps)
    first = int(FIRST * len(measured))
    print(
        f"{len(measured)} steps: {measured[0]:.1f} MB after the first, {measured[first]:.1f} after "
        f"{first + 1}, {measured[-1]:.1f} after the last; "
        f"in between {growth(measured):+.2f} MB per 1,000 steps"
    )
    if options.figure is not None:
        figure, axes = plt.subplots(figsize=(6, 2.5))
        axes.plot(np.arange(1, len(measured) + 1), measured, linewidth=1)
        axes.set(xlabel="step", ylabel="resident memory, MB", ylim=(0, 1.2 * measured.max()))
        figure.savefig(options.figure, dpi=120, bbox_inches="tight")
    return 0


if __name__ == "__main__":
    sys.exit(main())
