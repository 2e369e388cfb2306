"""A few seeds of `make torture`, whose model of what must hold is in tests/torture/truth.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torture.plan import plan

TESTS = Path(__file__).parents[1]
SEEDS = (1, 2, 3)


@pytest.mark.fault(
    "random faults at random moments of precompute-ref, train and evaluate, one after the other",
    "no process, lock or temporary file is left, status and reason are true, and the end is the same",
)
def test_a_few_seeds_of_the_torture() -> None:
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-m", "torture", "--forked", "--seeds", ",".join(map(str, SEEDS))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count(" holds, ") == len(SEEDS)


def test_a_seed_always_does_the_same_and_the_seeds_do_everything() -> None:
    seeds = [plan(number) for number in range(300)]
    assert seeds == [plan(number) for number in range(300)]
    kinds = {fault.kind for seed in seeds for faults in seed.attempts for fault in faults}
    assert len(kinds) == 12
    assert {seed.stage for seed in seeds} == {"precompute-ref", "train", "evaluate"}
    assert {seed.launcher for seed in seeds} == {True, False}
    assert {seed.last_ranks for seed in seeds} == {1, 2}
