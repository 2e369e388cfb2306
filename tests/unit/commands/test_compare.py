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
from dpo.commands.paired import differences_of_measurement, paired_differences, samples_side_by_side
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
    title = "differences from another run, by pair and prompt"
    shown = table(runs, {"results": results(runs), title: [("mean score", ["", "0.1"])]}, width)
    longest = max(len(line) for line in shown.splitlines() if line != title)
    assert longest <= max(width, len("KL, nats per sequence") + 2 * (12 + 2))
    for text in (value for _, values in results(runs) for value in values):
        assert all(part in shown for part in text.replace("[", " [ ").replace("]", " ] ").split())
    assert "…" not in shown  # a number without its first digits says something else


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


def reported(folder: Path, *, correct: list[int], scores: list[float], **versions: str) -> None:
    """A report on pairs and prompts of their own; beside what `make_run` writes."""
    place = folder / "report"
    place.mkdir(exist_ok=True)
    pairs = [
        {"prompt": n // 2, "correct": value, "loss": 1.0 - value, "unit": 1.0, "margin": 0.0}
        for n, value in enumerate(correct)
    ]
    samples = [
        {"prompt": f"p{n}", "reference": "r", "policy": f"{folder.name} {n}", "policy_score": score}
        for n, score in enumerate(scores)
    ]
    for name, rows in (("pairs", pairs), ("samples", samples)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = {"held-out data": "content a", "reference cache": "cache/x, identity 1"} | versions
    made = {"versions": known, "essentials": {"samples": "4 prompts"}}
    (place / "provenance.json").write_text(json.dumps(made))


def test_differences_are_by_pair_and_prompt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [make_run(tmp_path / name, 0.1) for name in ("a", "b")]
    reported(folders[0], correct=[0, 1, 0, 1], scores=[0.5, -0.5, 0.25])
    reported(folders[1], correct=[1, 1, 0, 1], scores=[0.75, -0.25, 0.5])
    runs = {run.label: run.reported for run in read_runs(folders)}
    assert differences_of_measurement(runs) == []
    rows = dict(paired_differences(runs))
    assert rows["reward accuracy"] == ["", "+0.250 [+0.000, +0.500]"]
    assert rows["held-out loss"] == ["", "-0.250 [-0.500, +0.000]"]
    assert rows["mean score"] == ["", "+0.250 [+0.250, +0.250]"]  # every prompt gained as much
    assert samples_side_by_side(runs) == [["p0", "a 0", "b 0"], ["p1", "a 1", "b 1"], ["p2", "a 2", "b 2"]]
    output = tmp_path / "out"
    assert run(["compare", *map(str, folders), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "differences from a, by pair and prompt" in printed
    assert max(map(len, printed.splitlines()[:-3])) <= 80
    assert "| query | a | b |" in (output / "comparison.md").read_text()


@pytest.mark.parametrize(
    ("versions", "said", "left_out"),
    [
        ({"held-out data": "content b"}, "held-out data differs", "reward accuracy"),
        ({"reference cache": "cache/x, identity 2"}, "the reference model differs", None),
    ],
)
def test_what_does_not_compare_is_said_first(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    versions: dict[str, str],
    said: str,
    left_out: str | None,
) -> None:
    folders = [make_run(tmp_path / name, 0.1) for name in ("a", "b")]
    reported(folders[0], correct=[0, 1], scores=[0.5])
    reported(folders[1], correct=[1, 1], scores=[0.5], **versions)
    output = tmp_path / "out"
    assert run(["compare", *map(str, folders), "--output", str(output)]) == 0
    assert capsys.readouterr().out.startswith(said)
    assert f"**{said}" in (output / "comparison.md").read_text()
    rows = dict(paired_differences({run.label: run.reported for run in read_runs(folders)}))
    assert left_out not in rows
    assert "mean score" in rows


def test_losses_of_different_kinds_are_not_subtracted(tmp_path: Path) -> None:
    folders = [make_run(tmp_path / "a", 0.1), make_run(tmp_path / "b", 0.3)]
    for folder in folders:
        reported(folder, correct=[0, 1], scores=[])
    rows = dict(paired_differences({run.label: run.reported for run in read_runs(folders)}))
    assert [*rows] == ["reward accuracy"]
