"""The prepared run of benchmarks/gpu works on CPUs with tiny shapes, so that no time of a card is lost."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "right": ("first loss less ln 2", "weights that differ", "graphs of attention for all widths"),
    "kernels": ("packed over flex", "sliced, useful", "eager over compiled"),
    "throughput": ("tokens per second", "operations of a micro-batch", "memory that plan counts"),
}


@dataclass(frozen=True)
class Rehearsal:
    """A script that runs on CPUs."""

    process: "subprocess.Popen[str]"
    output: Path
    """Its JSON file."""

    @staticmethod
    def of(script: str, folder: Path) -> "Rehearsal":
        """Starts a script."""
        output = folder / f"{script}.json"
        process = subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.gpu.{script}", "--rehearse", "--output", str(output)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Rehearsal(process, output)


@pytest.fixture(scope="module")
def rehearsals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Rehearsal]]:
    """All scripts, started together: most of their time one core loads Python."""
    folder = tmp_path_factory.mktemp("rehearsals")
    started = {script: Rehearsal.of(script, folder) for script in EXPECTED}
    yield started
    for rehearsal in started.values():
        rehearsal.process.kill()


@pytest.mark.parametrize("script", EXPECTED)
def test_a_rehearsal_has_every_number_and_no_problem(rehearsals: dict[str, Rehearsal], script: str) -> None:
    rehearsal = rehearsals[script]
    said, _ = rehearsal.process.communicate()
    assert rehearsal.process.returncode == 0, said
    found = json.loads(rehearsal.output.read_text())
    assert (found["problems"], found["not_as_expected"]) == ({}, [])
    names = {number["name"] for number in found["numbers"]}
    assert {*EXPECTED[script]} <= names
    assert found["rehearsal"]


def test_without_a_card_the_real_run_says_so(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.kernels", "--output", str(tmp_path / "x.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert ended.returncode == 2
    assert "--rehearse" in ended.stderr
