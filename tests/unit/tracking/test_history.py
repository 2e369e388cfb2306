"""metrics.jsonl read back."""

from pathlib import Path

import pytest

from dpo.tracking.history import complete_lines, curve, last_step, read_history
from dpo.tracking.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path)


def test_a_run_that_has_recorded_nothing_has_no_lines(folder: RunFolder) -> None:
    assert complete_lines(folder) == []
    assert read_history(folder) == []
    assert last_step(folder) == 0


def test_half_a_line_at_the_end_is_not_read(folder: RunFolder) -> None:
    folder.history.write_text('{"step": 1, "a": 0.5}\n{"step": 2, "a": 0.2')
    assert read_history(folder) == [{"step": 1, "a": 0.5}]
    assert last_step(folder) == 1


def test_a_curve_leaves_out_lines_without_the_metric(folder: RunFolder) -> None:
    folder.history.write_text('{"step": 1, "a": 0.5}\n{"step": 1, "b": 9}\n{"step": 2, "a": 0.25}\n')
    assert curve(read_history(folder), "a") == ([1, 2], [0.5, 0.25])
