"""The prepared run of benchmarks/gpu works on CPUs with tiny shapes, so that no time of a card is lost."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXPECTED = {
    "right": ("first loss less ln 2", "weights that differ", "graphs of attention for all widths"),
    "kernels": ("packed over flex", "sliced, useful", "eager over compiled"),
    "throughput": ("tokens per second", "operations of a micro-batch", "memory that plan counts"),
}


@pytest.mark.parametrize("script", EXPECTED)
def test_a_rehearsal_has_every_number_and_no_problem(script: str, tmp_path: Path) -> None:
    output = tmp_path / f"{script}.json"
    ended = subprocess.run(
        [sys.executable, "-m", f"benchmarks.gpu.{script}", "--rehearse", "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    found = json.loads(output.read_text())
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
