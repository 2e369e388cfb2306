"""The lines of metrics.jsonl, and the same numbers in TensorBoard and the bar."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from dpo import distributed, terminal
from dpo.tracking.metrics import Evaluation
from dpo.tracking.monitor import MARGINS, Monitor
from dpo.tracking.run_folder import RunFolder


def write_steps(run_dir: Path, steps: Mapping[int, Mapping[str, float]], first_step: int = 0) -> None:
    if first_step:  # TensorBoard's files are in order of the seconds in their names
        time.sleep(1 - time.time() % 1)
    with Monitor(RunFolder(run_dir), num_steps=9, first_step=first_step, unit="pairs") as monitor:
        for step, values in steps.items():
            monitor.record(step, values)
            monitor.advance(values)


def lines(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path: Path) -> None:
    steps = {
        0: {"eval/loss": 0.75},
        1: {"train/loss": 0.7, "train/rewards/accuracies": 0.5, "train/learning_rate": 1e-6},
        2: {"train/loss": 0.6, "train/rewards/accuracies": 0.625, "train/learning_rate": 2e-6},
    }
    write_steps(tmp_path, steps)
    assert lines(tmp_path) == [{"step": step, **values} for step, values in steps.items()]
    drawn = curves(tmp_path)
    assert drawn.keys() == {"eval/loss", "train/loss", "train/rewards/accuracies", "train/learning_rate"}
    for tag, points in drawn.items():
        expected = [(step, values[tag]) for step, values in steps.items() if tag in values]
        assert [step for step, _ in points] == [step for step, _ in expected]
        # TensorBoard keeps float32
        assert [value for _, value in points] == [np.float32(value) for _, value in expected]


def test_every_line_is_on_disk_as_soon_as_it_is_recorded(tmp_path: Path) -> None:
    with Monitor(RunFolder(tmp_path), num_steps=2, first_step=0, unit="pairs") as monitor:
        monitor.record(1, {"train/loss": 0.5})
        assert lines(tmp_path) == [{"step": 1, "train/loss": 0.5}]


def test_a_resumed_run_cuts_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path, {step: {"train/loss": float(step)} for step in (1, 2, 3, 4)})
    write_steps(tmp_path, {step: {"train/loss": 10.0 * step} for step in (3, 4, 5)}, first_step=2)
    expected = [(1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == expected
    assert curves(tmp_path)["train/loss"] == expected


@pytest.mark.parametrize("damage", [b"\0" * 64, b'{"step": 4, "tr\n{"step": 5}\n', b"\0\0\n"])
def test_damage_after_the_checkpoint_is_cut_and_said(
    tmp_path: Path, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    write_steps(tmp_path, {step: {"train/loss": float(step)} for step in (1, 2, 3)})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(damage)
    capsys.readouterr()
    write_steps(tmp_path, {3: {"train/loss": 30.0}}, first_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    said = capsys.readouterr().out
    assert "1 damaged line(s) were removed" in said
    assert "resumes after step 2" in said


def test_the_evaluation_at_the_checkpoint_stays(tmp_path: Path) -> None:
    write_steps(tmp_path, {2: {"eval/loss": 0.5}, 3: {"train/loss": 3.0}})
    write_steps(tmp_path, {3: {"train/loss": 4.0}}, first_step=2)
    assert lines(tmp_path) == [{"step": 2, "eval/loss": 0.5}, {"step": 3, "train/loss": 4.0}]


def test_a_line_that_a_crash_cut_in_half_is_cut_off(tmp_path: Path) -> None:
    write_steps(tmp_path, {1: {"train/loss": 1.0}, 2: {"train/loss": 2.0}})
    whole = (tmp_path / "metrics.jsonl").read_text()
    (tmp_path / "metrics.jsonl").write_text(whole[:-8])
    write_steps(tmp_path, {3: {"train/loss": 3.0}}, first_step=2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]


def test_a_run_that_died_before_its_first_step_measures_its_start_once(tmp_path: Path) -> None:
    write_steps(tmp_path, {0: {"eval/loss": 0.5}})
    write_steps(tmp_path, {0: {"eval/loss": 0.25}, 1: {"train/loss": 1.0}})
    assert lines(tmp_path) == [{"step": 0, "eval/loss": 0.25}, {"step": 1, "train/loss": 1.0}]
    assert curves(tmp_path)["eval/loss"] == [(0, 0.25)]


def test_only_the_main_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    write_steps(tmp_path, {1: {"train/loss": 1.0}})
    assert list(tmp_path.iterdir()) == []


def test_the_bar_shows_loss_accuracy_margin_and_rate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "FILE_SECONDS", 0.0)
    values = {
        "train/loss": 0.61234,
        "train/rewards/accuracies": 0.755,
        "train/rewards/margins": 0.1239,
        "perf/pairs_per_second": 42.25,
    }
    write_steps(tmp_path, {1: values})
    shown = capsys.readouterr().err
    for part in ("loss=0.6123", "acc=0.76", "margin=0.124", "pairs/s=42.2", "1/9"):
        assert part in shown


def test_charts_lay_chosen_beside_rejected_and_training_beside_held_out(tmp_path: Path) -> None:
    write_steps(tmp_path, {1: {"train/loss": 0.5}})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (summary,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(summary.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for part in layout.category for chart in part.chart}
    assert charts["loss"] == ["train/loss", "eval/loss"]
    assert charts["rewards, held-out"] == ["eval/rewards/chosen", "eval/rewards/rejected"]
    assert len(charts) == 7


def test_an_evaluation_leaves_numbers_a_histogram_and_samples_and_a_resumed_run_only_its_own(
    tmp_path: Path,
) -> None:
    def evaluated(first_step: int, steps: dict[int, str]) -> None:
        with Monitor(RunFolder(tmp_path), num_steps=9, first_step=first_step, unit="pairs") as monitor:
            for step, text in steps.items():
                margins = np.linspace(-1, 1, 10)
                monitor.show(step, Evaluation(values={"eval/loss": 1.0}, margins=margins, samples=text))

    evaluated(0, {0: "first", 2: "second", 4: "lost"})
    evaluated(2, {4: "third"})
    shown = plugin_event_accumulator.EventAccumulator(  # what TensorBoard's server reads with
        str(tmp_path / "tensorboard"), tensor_size_guidance={"text": 0, "histograms": 0}
    )
    shown.Reload()
    texts = [
        (e.step, e.tensor_proto.string_val[0].decode()) for e in shown.Tensors("eval/samples/text_summary")
    ]
    assert texts == [(0, "first"), (2, "second"), (4, "third")]
    assert [event.step for event in shown.Tensors(MARGINS)] == [0, 2, 4]
    assert [line["step"] for line in lines(tmp_path)] == [0, 2, 4]
