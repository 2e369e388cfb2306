"""What the batch plan of one epoch costs, from a hundred thousand to ten million groups.

    python -m benchmarks.plan_scale [--groups 1e5 1e6 1e7] [--figure docs/figures/plan_scale.png]

Synthetic groups: 1 to 3 pairs each, log-normal lengths as those of Anthropic HH. Each size is measured in a
fresh process. Ends with status 1 if the largest plan takes more than 20 seconds or 2 GiB.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.cache_scale import hardware
from benchmarks.cache_scale_report import print_table
from dpo.data.plan import BatchPlan, Sizes, share

GROUPS = (1e5, 3e5, 1e6, 3e6, 1e7)
PAIRS_PER_STEP, WORLD_SIZE, BUDGET = 256, 8, 16384
CUT_STEPS = 200
MAX_SECONDS, MAX_GIB = 20.0, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One size in one process."""

    groups: int
    steps: int
    plan_seconds: float
    """Shuffling the groups and filling the steps of one epoch."""
    cut_milliseconds: float
    """Sharing one step between 8 ranks and cutting it into micro-batches, which is done step by step."""
    imbalance: float
    """How much longer the slowest rank is busy than the mean, averaged over steps."""
    peak_gib: float
    """Largest resident memory, with the interpreter and the lengths themselves."""


def measure(groups: int) -> Measurement:
    """Plans one epoch over this many groups and cuts its first steps."""
    rng = np.random.default_rng(0)
    pairs = rng.integers(1, 4, groups)
    tokens = rng.lognormal(5.1, 0.6, groups).astype(np.int64) + 2
    started = time.perf_counter()
    plan = BatchPlan(pairs, seed=0, num_epochs=1, pairs_per_step=PAIRS_PER_STEP, max_steps=None)
    planned = time.perf_counter() - started
    excess, cut = [], min(CUT_STEPS, plan.num_steps)
    started = time.perf_counter()
    for number in range(1, cut + 1):
        width = tokens[plan.step(number).groups]
        sizes = Sizes(rows=np.ones_like(width), width=width, padded=False)
        shares = share(sizes, world_size=WORLD_SIZE, budget=BUDGET)
        loads = [sum(int(width[batch].sum()) for batch in batches) for batches in shares]
        excess.append(max(loads) / np.mean(loads) - 1)
    return Measurement(
        groups=groups,
        steps=plan.num_steps,
        plan_seconds=planned,
        cut_milliseconds=(time.perf_counter() - started) / cut * 1e3,
        imbalance=float(np.mean(excess)),
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    )


def draw(measured: Sequence[Measurement], path: Path) -> None:
    """Seconds against groups, logarithmic, beside slope 1 and the limit."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    groups = np.array([one.groups for one in measured], dtype=np.float64)
    seconds = [one.plan_seconds for one in measured]
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    axis.loglog(groups, seconds, "o-", color="#1f5fa8", markersize=5, label="measured", zorder=3)
    slope = seconds[-1] * groups / groups[-1]
    axis.loglog(groups, slope, "--", color="#888888", linewidth=1.2, label="slope 1")
    axis.axhline(MAX_SECONDS, color="#b3332b", linewidth=1)
    beside = axis.get_yaxis_transform()
    axis.text(0.02, MAX_SECONDS, "limit 20 s", color="#b3332b", va="bottom", transform=beside)
    axis.set(title="Planning one epoch", xlabel="preference groups", ylabel="seconds")
    axis.set_ylim(top=MAX_SECONDS * 4)
    axis.grid(True, which="major", color="#e5e5e5", linewidth=0.8)
    axis.legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, draws the figure; 1 if a limit is broken."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_scale", description=__doc__)
    parser.add_argument("--groups", type=float, nargs="+", default=GROUPS, help="sizes to measure")
    parser.add_argument("--figure", type=Path, help="where to draw the figure (PNG)")
    parser.add_argument("--measure", type=float, help=argparse.SUPPRESS)  # what the fresh process runs
    options = parser.parse_args(arguments)
    if options.measure:
        print(json.dumps(asdict(measure(int(options.measure)))))
        return 0
    print(hardware(), end="\n\n")
    measured = []
    for groups in options.groups:
        command = [sys.executable, "-m", "benchmarks.plan_scale", "--measure", str(groups)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        measured.append(Measurement(**json.loads(printed)))
    print_table(
        ("groups", "steps", "plan, s", "cut one step, ms", "slowest rank over the mean", "peak, GiB"),
        [
            (
                f"{one.groups:,}",
                f"{one.steps:,}",
                f"{one.plan_seconds:.2f}",
                f"{one.cut_milliseconds:.2f}",
                f"{one.imbalance:.1%}",
                f"{one.peak_gib:.2f}",
            )
            for one in measured
        ],
    )
    if options.figure:
        draw(measured, options.figure)
    kept = measured[-1].plan_seconds <= MAX_SECONDS and measured[-1].peak_gib <= MAX_GIB
    print(f"Limits of {MAX_SECONDS:.0f} s and {MAX_GIB:.0f} GiB: {'kept' if kept else 'BROKEN'}.")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
