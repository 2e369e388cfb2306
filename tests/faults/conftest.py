"""Fixtures of the fault tests, and the table of docs/reliability.md.

Each test names its fault and what is expected in `@pytest.mark.fault(FAULT, EXPECTED)`; FAULTS_REPORT=FILE
writes them as a table. TEST_LAUNCHER=1 starts the ranks through launch/run (`make test-faults`).
"""

import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from rig import LAUNCHER, STEPS, Rig, make_rig, metrics

RESULTS: dict[tuple[str, str], list[tuple[str, float, str]]] = {}


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Rig:
    """One experiment that all fault tests share."""
    return make_rig(tmp_path_factory.mktemp("faults"), tiny_model)


@pytest.fixture(scope="session")
def whole(rig: Rig) -> Path:
    """An undisturbed run on two ranks with ZeRO-2."""
    run_dir = rig.completed("whole")
    assert [line["step"] for line in metrics(run_dir) if "train/loss" in line] == list(range(1, STEPS + 1))
    return run_dir


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the long sweep unless this is `make test-faults`."""
    for item in items:
        if item.get_closest_marker("sweep") and not LAUNCHER:
            item.add_marker(pytest.mark.skip(reason="part of the long sweep: make test-faults"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    """Records the result of each fault."""
    report = yield
    fault = item.get_closest_marker("fault")
    if fault is not None and (report.when == "call" or report.outcome != "passed"):
        test = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
        RESULTS.setdefault((fault.args[0], fault.args[1]), []).append((report.outcome, report.duration, test))
    return report


def pytest_terminal_summary() -> None:
    """Writes the table: what was tried, what is expected, and the result."""
    file = os.environ.get("FAULTS_REPORT")
    if not file or not RESULTS:
        return
    lines = ["| fault | expected | result | test in tests/faults |", "|---|---|---|---|"]
    for (fault, expected), results in RESULTS.items():
        counts = Counter(outcome for outcome, _, _ in results)
        result = ", ".join(f"{outcome} ({n} times)" if n > 1 else outcome for outcome, n in counts.items())
        seconds = sum(seconds for _, seconds, _ in results)
        lines.append(f"| {fault} | {expected} | {result}; {seconds:.0f} s | `{results[0][2]}` |")
    Path(file).write_text("\n".join(lines) + "\n")
