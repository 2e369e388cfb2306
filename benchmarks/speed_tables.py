"""The tables of benchmarks.speed."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.speed_processes import Measurement


def tables(measured: Sequence[Measurement], facts: Mapping[str, Any], peak: float) -> list[str]:
    """Two Markdown tables: every system by itself, and ours against the others.

    Args:
        measured: Of all rounds.
        facts: Useful floating-point operations of each work and task.
        peak: Of the matrix product, in FLOP/s.
    """
    turns: dict[tuple[str, str, str], list[Measurement]] = {}
    for one in measured:
        turns.setdefault((one.work, one.task, one.system), []).append(one)
    rates = {key: statistics.median(one.pairs / one.seconds for one in own) for key, own in turns.items()}
    memory = {key: statistics.median(one.peak_bytes for one in own) for key, own in turns.items()}
    lines = [
        f"Matrix product: {peak / 1e9:.0f} GFLOP/s.\n",
        "| work | task | system | pairs/s (of all rounds) | tokens/pair | useful GFLOP/s | of the product "
        "| peak memory, GiB |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for key, own in turns.items():
        work, task, system = key
        flops = facts[work]["useful_flops"][task] / own[0].pairs * rates[key]
        each = sorted(one.pairs / one.seconds for one in own)
        lines.append(
            f"| {work} | {task} | {system} | {rates[key]:.3f} ({each[0]:.3f} to {each[-1]:.3f}) "
            f"| {own[0].tokens / own[0].pairs:.1f} | {flops / 1e9:.1f} | {flops / peak:.2f} "
            f"| {memory[key] / 2**30:.2f} |"
        )
    lines += ["", "| work | task | against | pairs/s | peak memory | largest difference of the losses |"]
    lines += ["|---|---|---|---:|---:|---:|"]
    for work, task, system in turns:
        ours, theirs = (work, task, "ours"), (work, task, system)
        if system != "ours" and ours in turns:
            gap = largest_difference(turns[ours][0].losses, turns[theirs][0].losses)
            lines.append(
                f"| {work} | {task} | {system} | {rates[ours] / rates[theirs]:.2f} x "
                f"| {memory[ours] / memory[theirs]:.2f} x | {f'{gap:.1e}' if task == 'train' else ''} |"
            )
    return lines


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest |ours - theirs| / |theirs| over the steps; 0 without steps."""
    return max((abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
