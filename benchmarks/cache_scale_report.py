"""The tables and the figure of `benchmarks.cache_scale`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FITTED_DECADES = 2.0
"""The growth is fitted to the sizes within this many powers of ten of the largest."""
MAX_SECONDS, MAX_MIB = 60.0, 4096.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One load and join in a process of its own."""

    pairs: int
    load: float
    """Seconds of `ReferenceStore.load`."""
    join: float
    """Seconds of finding all keys and gathering their log-probs."""
    before_mib: float
    """Resident memory before the load: the interpreter and its libraries."""
    peak_mib: float
    """Largest resident memory, mapped files included."""

    @property
    def total(self) -> float:
        """Seconds."""
        return self.load + self.join

    @property
    def added_mib(self) -> float:
        """Memory of load and join, without the interpreter."""
        return self.peak_mib - self.before_mib


def print_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Prints a markdown table with right-aligned numbers, and an empty line."""
    print(f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}", sep="\n")
    print(*(f"| {' | '.join(row)} |" for row in rows), sep="\n", end="\n\n", flush=True)


def print_scale(measured: Sequence[Measurement]) -> None:
    """The table of times and memory, and the fitted growth."""
    print_table(
        (
            "pairs",
            "load s",
            "join s",
            "total s",
            "s per million pairs",
            "MiB before",
            "peak MiB",
            "added MiB",
        ),
        [
            (
                f"{one.pairs:,}",
                *(f"{seconds:.3f}" for seconds in (one.load, one.join, one.total)),
                f"{one.total / one.pairs * 1e6:.2f}",
                *(f"{mib:,.0f}" for mib in (one.before_mib, one.peak_mib, one.added_mib)),
            )
            for one in measured
        ],
    )
    largest = max(one.pairs for one in measured)
    fitted = [one for one in measured if one.pairs * 10**FITTED_DECADES >= largest]
    if len(fitted) > 1:
        pairs = np.log([one.pairs for one in fitted])
        time_slope = np.polyfit(pairs, np.log([one.total for one in fitted]), 1)[0]
        memory_slope = np.polyfit(pairs, np.log([one.added_mib for one in fitted]), 1)[0]
        smallest = min(one.pairs for one in fitted)
        print(
            f"Fitted from {smallest:,} to {largest:,} pairs: time grows as pairs^{time_slope:.2f}, ", end=""
        )
        print(f"added memory as pairs^{memory_slope:.2f}. All values checked bit for bit.\n")


def draw(measured: Sequence[Measurement], path: Path) -> None:
    """Time and memory against pairs on logarithmic axes, with slope 1 and the limits."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "axes.spines.top": False, "axes.spines.right": False})
    pairs = np.array([one.pairs for one in measured], dtype=np.float64)
    panels = (
        ("Time to load and join", "seconds", [one.total for one in measured], MAX_SECONDS, "limit 60 s"),
        (
            "Peak memory without the interpreter",
            "MiB",
            [one.added_mib for one in measured],
            MAX_MIB,
            "limit 4 GiB",
        ),
    )
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
    for axis, (title, unit, values, limit, limit_name) in zip(axes, panels, strict=True):
        axis.loglog(pairs, values, "o-", color="#1f5fa8", markersize=5, label="measured", zorder=3)
        axis.loglog(
            pairs, values[-1] * pairs / pairs[-1], "--", color="#888888", linewidth=1.2, label="slope 1"
        )
        axis.axhline(limit, color="#b3332b", linewidth=1)
        beside = axis.get_yaxis_transform()
        axis.text(0.02, limit, limit_name, color="#b3332b", va="bottom", fontsize=10, transform=beside)
        axis.set(title=title, xlabel="preference pairs", ylabel=unit)
        axis.set_ylim(top=limit * 4)
        axis.grid(True, which="major", color="#e5e5e5", linewidth=0.8)
        axis.legend(frameon=False, loc="lower right")
    figure.suptitle("Joining a data set with its reference cache", fontsize=13)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
