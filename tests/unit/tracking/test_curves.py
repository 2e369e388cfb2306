"""Curves may be lost, the run not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from dpo.tracking.curves import Curves
from dpo.tracking.monitor import CHARTS
from dpo.tracking.run_folder import RunFolder


def full(*arguments: Any, **named: Any) -> None:
    raise OSError(28, "No space left on device")


class Broken:
    """A tracker whose server is gone."""

    calls = 0

    def log(self, values: dict[str, Any], step: int | None) -> None:
        self.calls += 1
        raise ConnectionError("the server is gone")

    def finish(self) -> None:
        raise ConnectionError("the server is gone")


@pytest.mark.parametrize("broken", ["add_scalar", "add_custom_scalars", "add_histogram", "add_text", "close"])
def test_what_fails_is_said_once_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: str
) -> None:
    monkeypatch.setattr(SummaryWriter, broken, full)
    curves = Curves(RunFolder(tmp_path), 0, [], CHARTS)
    for step in (1, 2):
        curves.record(step, {"train/loss": 0.5})
        curves.histogram("margins", np.array([1.0, 2.0]), step)
        curves.text("samples", "x", step)
    curves.close()
    assert capsys.readouterr().out.count("No space left on device") == 1


def test_a_disk_that_is_full_meets_the_next_call_without_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    curves = Curves(RunFolder(tmp_path), 0, [], CHARTS)
    assert curves._writer is not None
    writer = curves._writer._get_file_writer().event_writer._async_writer
    monkeypatch.setattr(writer._writer, "write", full)
    curves.record(1, {"train/loss": 0.5})
    writer._worker.join(5)
    curves.record(2, {"train/loss": 0.5})
    curves.close()
    said = capfd.readouterr()
    assert said.out.count("No space left on device") == 1
    assert "Traceback" not in said.err


def test_a_tracker_that_fails_receives_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tracker = Broken()
    curves = Curves(RunFolder(tmp_path), 0, [tracker], CHARTS)
    for step in (1, 2):
        curves.record(step, {"train/loss": 0.5})
    curves.close()
    assert tracker.calls == 1
    assert capsys.readouterr().out.count("the server is gone") == 1
