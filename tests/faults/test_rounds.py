"""Rounds that are killed anywhere: `make torture-rounds`; moments and comparison are in tests/torture."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from torture import rounds
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
    assert "; the same end" in done.stdout


def test_runs_follow_each_other_until_there_were_enough_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def killed(folder: Path, kills: int, moments: random.Random, seconds: float) -> int:
        asked.append(kills)
        return min(kills, 4)  # then it has finished

    for name, stand_in in {
        "preload": lambda: None,
        "undisturbed": lambda _: ({"a": "1"}, 60.0),
        "killed": killed,
        "different": lambda run, _: ["a"] if run.name.endswith("_2") else [],
    }.items():
        monkeypatch.setattr(rounds, name, stand_in)
    monkeypatch.setattr(sys, "argv", ["rounds", "--folder", str(tmp_path), "--kills", "10"])
    assert rounds.main() == 1
    assert asked == [10, 6, 2]
    assert "10 kills of 3 run(s); other files: ['killed_0_2: a']" in capsys.readouterr().out


def test_only_timing_is_left_out_of_the_comparison() -> None:
    first, second, other = (
        without_timing(f'{{"train/loss": {loss}, "perf/seconds": {seconds}}}\n'.encode())
        for loss, seconds in ((1, 2), (1, 3), (2, 2))
    )
    assert first == second != other
