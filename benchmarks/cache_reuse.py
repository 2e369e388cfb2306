"""The cost of a changed experiment: sequences and forward passes of the reference, by what was changed.

    python -m benchmarks.cache_reuse

A tiny model and 11,000 pairs of random words, with the real commands. The numbers are checked against a count
of distinct (prompt, completion) that does not use the cache; the exit status is 1 if one differs.
"""

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cache_bench import WORDS, Bench, make_bench
from dpo.model.scorer import SequenceScorer

NUM_PAIRS, NUM_NEW = 10_000, 1_000
CUT = 40  # tokens: some sequences are longer
Pair = dict[str, str]


def random_pairs(number: int) -> list[Pair]:
    """Pairs; every fourth shares its prompt and chosen completion with the one before it."""
    rng = np.random.default_rng(0)

    def text() -> str:
        return " ".join(rng.choice(WORDS, int(rng.integers(1, 5))))

    pairs: list[Pair] = []
    for index in range(number):
        pair = {"prompt": f"{index} {text()}", "chosen": f" {text()} yes", "rejected": f" {text()} no"}
        if index % 4 == 3:
            pair |= {key: pairs[-1][key] for key in ("prompt", "chosen")}
        pairs.append(pair)
    return pairs


def distinct(pairs: Sequence[Pair]) -> set[tuple[str, str]]:
    """Every distinct (prompt, completion) in the text."""
    return {(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")}


def num_cut(pairs: Sequence[Pair]) -> int:
    """Sequences of pairs that do not fit CUT tokens: the prompt is cut for both completions.

    A byte is a token here, and EOS is added.
    """
    longest = [len(pair["prompt"]) + max(len(pair["chosen"]), len(pair["rejected"])) + 1 for pair in pairs]
    return 2 * sum(length > CUT for length in longest)


@contextmanager
def counted_passes() -> Iterator[list[int]]:
    """Counts the forward passes of every model in this process."""
    passes, original = [0], SequenceScorer.forward

    def forward(self: SequenceScorer, *arguments: Any, **options: Any) -> torch.Tensor:
        passes[0] += 1
        return original(self, *arguments, **options)

    SequenceScorer.forward = forward  # type: ignore[method-assign]
    try:
        yield passes
    finally:
        SequenceScorer.forward = original  # type: ignore[method-assign]


def write(path: Path, pairs: Sequence[Pair]) -> str:
    """Writes pairs as JSON Lines and returns the path."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return str(path)


def main() -> int:
    """Prints the table; 1 if a number is not as expected."""
    torch.set_num_threads(1)
    wrong = 0
    pairs = random_pairs(NUM_PAIRS + NUM_NEW)
    old, everything = distinct(pairs[:NUM_PAIRS]), distinct(pairs)
    num_new = len(everything - old)
    with tempfile.TemporaryDirectory() as name:
        bench = make_bench(Path(name))
        shuffled = [pairs[index] for index in np.random.default_rng(1).permutation(len(pairs))]
        ten = write(Path(name) / "ten.jsonl", pairs[:NUM_PAIRS])
        eleven = write(Path(name) / "eleven.jsonl", shuffled)
        halves = [write(Path(name) / f"half{i}.jsonl", pairs[i : NUM_PAIRS + NUM_NEW : 2]) for i in (0, 1)]
        both = json.dumps([{"path": half, "weight": 1} for half in halves])
        same = ["--data.train", ten]
        training = "--train.learning_rate 1 --loss.beta 5 --loss.label_smoothing 0.1 --train.seed 7"
        batches = "--train.pairs_per_step 3 --train.max_tokens_per_micro_batch 99"
        cut = ["--data.max_length", str(CUT)]
        changes = [
            (f"first build, {NUM_PAIRS:,} pairs", same, len(old), len(old)),
            ("learning rate, beta, label smoothing, seed", [*same, *training.split()], len(old), 0),
            ("pairs per step, micro-batch, run folder", [*same, *batches.split()], len(old), 0),
            (f"{NUM_NEW:,} pairs more, shuffled", ["--data.train", eleven], len(everything), num_new),
            ("the same from two files", ["--data.train", both], len(everything), 0),
            (f"max_length {CUT}, which cuts some pairs", [*same, *cut], None, None),
            ("max_length as before", same, len(old), 0),
        ]
        print("| what changed | sequences wanted | computed | forward passes |\n|---|---:|---:|---:|")
        for number, (change, arguments, wanted, expected) in enumerate(changes):
            hits, misses, passes = precompute(bench, [*arguments, "--run_dir", f"{name}/run{number}"])
            right = (passes > 0) == (misses > 0)
            if expected is None:  # different sequences may be equal once they are cut
                right &= 0 < misses <= num_cut(pairs[:NUM_PAIRS])
            else:
                right &= (hits + misses, misses) == (wanted, expected)
            wrong += not right
            note = "" if right else f" WRONG: expected {expected} of {wanted}"
            print(f"| {change} | {hits + misses:,} | {misses:,}{note} | {passes:,} |", flush=True)
    return int(wrong > 0)


def precompute(bench: Bench, arguments: list[str]) -> tuple[int, int, int]:
    """Runs precompute-ref; returns hits, misses and forward passes."""
    with counted_passes() as passes:
        status, output = bench.dpo("precompute-ref", "--reference.max_tokens_per_batch", "16384", *arguments)
    found = re.search(r"(\d+) sequences were cached, (\d+) computed", output)
    assert status == 0, output
    assert found, output
    return int(found[1]), int(found[2]), passes[0]


if __name__ == "__main__":
    sys.exit(main())
