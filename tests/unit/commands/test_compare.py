"""Run folders side by side: settings that differ, results, speed, and folders that are not runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo.cli.main import run
from dpo.commands.compare import (
    RESULTS,
    SPEED,
    differing_settings,
    points_of,
    read_runs,
    results,
    speeds,
    table,
)
from dpo.report.labels import LABELS

REPORT = {"score/policy": 0.5, "score/policy/low": 0.4, "score/policy/high": 0.6, "win_rate": None}
KL = {"kl/sequence": 2.0, "kl/sequence/low": 1.5, "kl/sequence/high": 2.5}


def make_run(folder: Path, beta: float, *, report: dict[str, Any] | None = None, lines: int = 4) -> Path:
    folder.mkdir(parents=True)
    settings = {"run_dir": str(folder), "loss": {"type": "sigmoid", "beta": beta}, "train": {"seed": 0}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    history = [{"step": 0, "eval/loss": 0.7}]
    history += [
        {"step": step, "train/loss": beta / step, "perf/pairs_per_second": 10.0 * step}
        for step in range(1, lines)
    ]
    history.append({"step": lines - 1, "eval/loss": beta})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    if report is not None:
        (folder / "report").mkdir()
        (folder / "report" / "summary.json").write_text(json.dumps(report))
    return folder


def test_every_metric_of_the_tables_has_a_label() -> None:
    assert {*RESULTS, *SPEED} <= LABELS.keys()


def test_only_settings_that_differ_are_listed(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "a", 0.1), make_run(tmp_path / "b", 0.3)])
    assert differing_settings(runs) == [("loss.beta", ["0.1", "0.3"])]


def test_numbers_come_from_the_report_or_else_from_the_last_evaluation(tmp_path: Path) -> None:
    runs = read_runs(
        [make_run(tmp_path / "a", 0.1, report=REPORT | {"eval/loss": 0.25}), make_run(tmp_path / "b", 0.3)]
    )
    assert results(runs) == [
        ("steps", ["3", "3"]),
        ("held-out loss", ["0.250", "0.300"]),
        ("mean score", ["0.500 [0.400, 0.600]", "-"]),
    ]


def test_speed_is_the_median_step(tmp_path: Path) -> None:
    runs = read_runs([make_run(tmp_path / "a", 0.1), make_run(tmp_path / "b", 0.3, lines=2)])
    assert speeds(runs) == [("pairs per second", ["20", "10"])]


def test_a_run_is_a_point_if_it_has_score_and_kl(tmp_path: Path) -> None:
    runs = read_runs(
        [make_run(tmp_path / "a", 0.1, report=REPORT | KL), make_run(tmp_path / "b", 0.3, report=REPORT)]
    )
    (points,) = points_of(runs).values()
    assert (points[0].kl.mean, points[0].score.high) == (2.0, 0.6)


def test_runs_of_the_same_name_are_labelled_by_path(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "x" / "a", 0.1), make_run(tmp_path / "y" / "a", 0.3)]
    assert [run.label for run in read_runs(folders)] == [str(folder) for folder in folders]


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_fits_the_terminal_if_possible(tmp_path: Path, width: int) -> None:
    folders = [make_run(tmp_path / f"{n}_{'x' * 60}", 0.1 * n, report=REPORT | KL) for n in (1, 2)]
    runs = read_runs(folders)
    lines = table(runs, {"results": results(runs)}, width).splitlines()
    assert max(map(len, lines)) <= max(width, len("KL, nats per sequence") + 2 * (12 + 2))


def test_the_command_writes_table_numbers_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        make_run(tmp_path / name, beta, report=REPORT | KL) for name, beta in (("a|b", 0.1), ("c", 0.3))
    ]
    output = tmp_path / "out"
    assert run(["compare", *map(str, folders), "--output", str(output)]) == 0
    assert "settings that differ" in capsys.readouterr().out
    assert {path.name for path in output.iterdir()} == {
        "comparison.md",
        "comparison.json",
        "curves.png",
        "score_kl.png",
    }
    text = (output / "comparison.md").read_text()
    assert "| | a\\|b | c |" in text
    assert "![curves](curves.png)" in text
    assert json.loads((output / "comparison.json").read_text())["c"]["summary"]["eval/loss"] == 0.3


def test_all_folders_that_are_not_runs_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compare", str(tmp_path), str(tmp_path / "no")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}: no config.yaml in it" in said
    assert f"{tmp_path / 'no'}: no such folder" in said
    assert run(["compare", str(make_run(tmp_path / "a", 0.1))]) == 2
    assert "at least two" in capsys.readouterr().err
    assert run(["compare", "a", "b", "--outptu", "x"]) == 2
    assert "--outptu: no such option" in capsys.readouterr().err
