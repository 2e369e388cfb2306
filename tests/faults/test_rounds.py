"""Rounds that are killed anywhere: `make torture-rounds`; moments and comparison are in tests/torture."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from torture.rounds import without_timing

TESTS = Path(__file__).parents[1]


@pytest.mark.sweep
@pytest.mark.timeout(1800)
@pytest.mark.fault(
    "kill -9 of `dpo rounds` and of all ranks of its stages, at 10 random moments of two rounds",
    "the same command goes on; data, weights, metrics, samples and tables end with the same bytes",
)
def test_two_rounds_that_are_killed_ten_times_end_as_those_that_are_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torture.rounds", "--folder", str(tmp_path), "--kills", "10"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1700)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "kills; the same end" in done.stdout


def test_only_timing_is_left_out_of_the_comparison() -> None:
    first, second, other = (
        without_timing(f'{{"train/loss": {loss}, "perf/seconds": {seconds}}}\n'.encode())
        for loss, seconds in ((1, 2), (1, 3), (2, 2))
    )
    assert first == second != other
