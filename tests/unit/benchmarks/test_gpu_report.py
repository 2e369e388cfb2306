"""The report of the prepared run: what is judged, and that one fault does not cost the other sections."""

import json
from pathlib import Path

import pytest

from benchmarks.gpu.report import Report


def report(tmp_path: Path, *, rehearse: bool = False, seconds: float = 60.0) -> Report:
    return Report("test", rehearse, tmp_path / "folder" / "out.json", seconds)


def test_numbers_outside_their_bounds_are_marked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = report(tmp_path)
    made.section("one", lambda: made.number("fast", 5.0, "x", low=4))
    made.section("two", lambda: made.number("slow", 3.0, "x", low=4, high=9))
    assert made.finish() == 1
    assert capsys.readouterr().out.count("not as expected") == 2  # beside the number, and in the last line
    written = json.loads((tmp_path / "folder" / "out.json").read_text())
    assert written["not_as_expected"] == ["slow"]
    assert [number["section"] for number in written["numbers"]] == ["one", "two"]


def test_a_rehearsal_does_not_judge_speed(tmp_path: Path) -> None:
    made = report(tmp_path, rehearse=True)
    made.number("slow", 3.0, "x", low=4)
    assert made.finish() == 0
    made.number("loss", 3.0, "nats", high=0.1, speed=False)
    assert made.finish() == 1


def test_a_fault_costs_its_own_section_only(tmp_path: Path) -> None:
    made = report(tmp_path)

    def broken() -> None:
        raise ValueError("of the test")

    made.section("broken", broken)
    made.section("whole", lambda: made.number("a", 1.0, ""))
    assert made.finish() == 1
    assert made.problems == {"broken": "ValueError: of the test"}
    assert [number.name for number in made.numbers] == ["a"]


def test_no_section_starts_after_the_time_is_over(tmp_path: Path) -> None:
    made = report(tmp_path, seconds=-1.0)
    made.section("late", lambda: made.number("a", 1.0, ""))
    assert made.numbers == []
    assert "left out" in made.problems["late"]
