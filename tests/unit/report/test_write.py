"""The files of a report: all of them, complete, replaced by the next report."""

import json
import math
from dataclasses import replace
from pathlib import Path

from nasty import NASTY, nasty_report

from dpo.processes import this_process
from dpo.report.content import Provenance, Report, SampleRow
from dpo.report.write import write_report


def row(index: int = 0, **fields: object) -> SampleRow:
    texts = {"prompt": "It was", "reference": " sad.", "policy": " happy."}
    return SampleRow(index=index, seed=7, **{**texts, **fields})  # type: ignore[arg-type]


def report(rows: list[SampleRow], **fields: object) -> Report:
    values = {
        "summary": {"win_rate": 0.9, "win_rate/low": 0.8, "win_rate/high": 0.95, "eval/loss": 0.5},
        "table_rows": 2,
        "provenance": Provenance(essentials={}, commands=[]),
    }
    return Report(rows=rows, **{**values, **fields})  # type: ignore[arg-type]


def test_the_folder_holds_the_report_the_summary_and_every_sample(tmp_path: Path) -> None:
    rows = [row(0, reference_score=-0.5, policy_score=0.75), row(1), row(2, prompt=NASTY)]
    write_report(report(rows), tmp_path / "report", title="runs/a")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.md",
        "report.html",
        "figures",
        "summary.json",
        "samples.jsonl",
        "pairs.jsonl",
        "provenance.json",
    }
    assert json.loads((tmp_path / "report/summary.json").read_text()) == report(rows).summary
    lines = [json.loads(line) for line in (tmp_path / "report/samples.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2]
    assert lines[0] == {
        "index": 0,
        "seed": 7,
        "prompt": "It was",
        "reference": " sad.",
        "policy": " happy.",
        "reference_score": -0.5,
        "policy_score": 0.75,
    }
    assert lines[2]["prompt"] == NASTY


def test_samples_for_judges_and_verdicts_are_there_where_the_report_has_them(tmp_path: Path) -> None:
    line = {"instruction": NASTY, "messages": [{"role": "user", "content": NASTY}], "output": "x"}
    write_report(report([row()], for_judges=[line], judged=[{"index": 0}]), tmp_path, title="runs/a")
    assert json.loads((tmp_path / "for_judges.jsonl").read_text()) == line
    assert json.loads((tmp_path / "judged.jsonl").read_text()) == {"index": 0}
    write_report(report([row()]), tmp_path, title="runs/a")
    assert not {*tmp_path.glob("for_judges.jsonl"), *tmp_path.glob("judged.jsonl")}


def test_what_a_killed_process_left_half_written_is_removed(tmp_path: Path) -> None:
    dead = replace(this_process(), began="1").tag()
    left = [
        tmp_path / f".summary.json.0123456789ab.{dead}.writing",
        tmp_path / f"figures/.a.png.0.{dead}.writing",
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.touch()
    write_report(report([row()]), tmp_path, title="runs/a")
    assert not any(path.exists() for path in left)
    assert not [*tmp_path.rglob("*.writing")]


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    write_report(report([row()]), tmp_path, title="runs/a")
    write_report(report([row()], summary={"eval/loss": 0.25}), tmp_path, title="runs/a")
    assert json.loads((tmp_path / "summary.json").read_text()) == {"eval/loss": 0.25}


def test_a_number_that_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    numbers = {"eval/loss": math.nan, "kl/token": math.inf}
    write_report(report([], summary=numbers), tmp_path, title="runs/a")
    assert json.loads((tmp_path / "summary.json").read_text()) == {"eval/loss": None, "kl/token": None}


def test_figures_are_beside_the_report_and_shown_by_it(tmp_path: Path) -> None:
    write_report(nasty_report(), tmp_path, title="runs/a")
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"training.png", "rewards.png", "margins.png", "score_kl.png", "lengths.png"}
    assert (tmp_path / "figures/margins.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "report.md").read_text()
    assert "![training](figures/training.png)\n\ncaption of training" in text
