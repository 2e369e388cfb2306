"""Held-out accuracy by how far the scores of a pair's completions are apart; docs/results.md has the command.

    python -m benchmarks.accuracy_by_gap data/smollm2/books runs/smollm2/frontier/beta_0.1 ...

Reads the held-out rows of a preference folder and, of each run, what `dpo evaluate` wrote.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from dpo.evaluate.statistics import share_by_cluster
from dpo.report.markdown import table

PARTS = 4


class ByPair(NamedTuple):
    """Of N held-out pairs, in order of prompts."""

    gaps: npt.NDArray[np.float64]
    """(N,) score of the chosen completion less that of the rejected one."""
    correct: npt.NDArray[np.float64]
    """(N,) 1 where the run orders the pair as the scores do, 0.5 for a tie."""
    prompts: npt.NDArray[np.int64]
    """(N,) whose pair it is."""


def read_pairs(data: Path, run: Path) -> ByPair:
    """Joins a run's held-out pairs with the scores of their completions.

    Args:
        data: A folder with test.parquet, which data_prep wrote with a scorer.
        run: A run that was evaluated on it.

    Raises:
        ValueError: The run was evaluated on other pairs.
    """
    rows = pq.read_table(data / "test.parquet").to_pylist()
    evaluated = defaultdict(list)
    for line in (run / "report" / "pairs.jsonl").read_text().splitlines():
        pair = json.loads(line)
        evaluated[pair["prompt"]].append(pair["correct"])
    if [len(evaluated[number]) for number in range(len(rows))] != [len(row["pairs"]) for row in rows]:
        raise ValueError(f"{run} was evaluated on other pairs than those of {data}/test.parquet")
    found = [
        (row["scores"][pair["chosen"]] - row["scores"][pair["rejected"]], correct, number)
        for number, row in enumerate(rows)
        for pair, correct in zip(row["pairs"], evaluated[number], strict=True)
    ]
    gaps, correct, prompts = zip(*found, strict=True)
    return ByPair(np.array(gaps), np.array(correct), np.array(prompts))


def by_gap(pairs: ByPair) -> list[tuple[str, str, int]]:
    """Range of the gap, accuracy with its interval, and number of pairs, for each quarter of the pairs."""
    ends = np.quantile(pairs.gaps, np.linspace(0, 1, PARTS + 1))
    part = np.searchsorted(ends[1:-1], pairs.gaps, side="left")
    rows = []
    for number in range(PARTS):
        own = part == number
        share = share_by_cluster(pairs.correct[own], pairs.prompts[own])
        accuracy = f"{share.mean:.3f} [{share.low:.3f}, {share.high:.3f}]"
        rows.append((f"{ends[number]:.2f} to {ends[number + 1]:.2f}", accuracy, int(own.sum())))
    return rows


def main() -> None:
    """Prints a table: a row for each quarter of the pairs, a column for each run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, help="the preference folder")
    parser.add_argument("runs", type=Path, nargs="+", help="run folders with a report")
    given = parser.parse_args()
    columns = [by_gap(read_pairs(given.data, run)) for run in given.runs]
    rows = [
        [gap, str(n), *(column[at][1] for column in columns)] for at, (gap, _, n) in enumerate(columns[0])
    ]
    print(table(["scores apart by", "pairs", *(run.name for run in given.runs)], rows))


if __name__ == "__main__":
    main()
