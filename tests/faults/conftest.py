"""Faults: what each test tries and promises, and the table of docs/reliability.md.

FAULTS_REPORT=FILE writes the table; TEST_LAUNCHER=1 starts ranks through launch/run (`make test-faults`).
"""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from rig import LAUNCHER, STEPS, Rig, make_rig, metrics

RESULTS: dict[tuple[str, str], list[tuple[str, float, str]]] = {}


@pytest.fixture(scope="session")
def rig(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Rig:
    """One experiment for all of them."""
    return make_rig(tmp_path_factory.mktemp("faults"), tiny_model)


@pytest.fixture(scope="session")
def whole(rig: Rig) -> Path:
    """The run on two ranks with ZeRO-2 that nothing happened to."""
    run_dir = rig.completed("whole")
    assert [line["step"] for line in metrics(run_dir) if "train/loss" in line] == list(range(1, STEPS + 1))
    return run_dir


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves the long sweep to `make test-faults`."""
    for item in items:
        if item.get_closest_marker("sweep") and not LAUNCHER:
            item.add_marker(pytest.mark.skip(reason="part of the long sweep: make test-faults"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Generator[None, Any, Any]:
    """Remembers how each fault ended."""
    report = yield
    fault = item.get_closest_marker("fault")
    if fault is not None and (report.when == "call" or report.outcome != "passed"):
        test = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
        said = "as promised" if report.outcome == "passed" else report.outcome
        RESULTS.setdefault((fault.args[0], fault.args[1]), []).append((said, report.duration, test))
    return report


def pytest_terminal_summary() -> None:
    """Writes the table of what was tried, what is promised, and what happened."""
    file = os.environ.get("FAULTS_REPORT")
    if not file or not RESULTS:
        return
    lines = ["| fault | promise | what happened | test in tests/faults |", "|---|---|---|---|"]
    for (what, promise), ends in RESULTS.items():
        counts = {said: sum(said == other for other, _, _ in ends) for said, _, _ in ends}
        outcome = ", ".join(f"{said} ({n} times)" if n > 1 else said for said, n in counts.items())
        seconds = sum(seconds for _, seconds, _ in ends)
        lines.append(f"| {what} | {promise} | {outcome}; {seconds:.0f} s | `{ends[0][2]}` |")
    Path(file).write_text("\n".join(lines) + "\n")
