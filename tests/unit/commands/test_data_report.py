"""`dpo data`: what it prints and writes, with and without a reference cache, and when it loads a model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo.cli.main import run
from dpo.commands import data_report


@pytest.fixture
def keys(
    tiny_model: Path,
    tmp_path: Path,
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., list[dict[str, Any]]],
) -> list[str]:
    """An experiment of 12 groups, and 3 of them as held-out data."""
    rows = preference_rows(12)
    values = {
        "run_dir": tmp_path / "run",
        "model.name_or_path": tiny_model,
        "model.dtype": "float32",
        "data.train": write_jsonl(rows),
        "data.test": write_jsonl(rows[:3], "test.jsonl"),
        "data.cache_dir": tmp_path / "tokenized",
        "reference.cache_dir": tmp_path / "reference",
    }
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


def test_without_a_cache_and_without_a_model_the_data_is_described(
    keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delattr(data_report, "frozen_scorer")
    assert run(["data", *keys, "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.split("\ndata\n")[0].splitlines())) <= 80
    assert "What the reference thinks" not in printed
    numbers = json.loads((tmp_path / "out/summary.json").read_text())
    assert numbers["training/groups"] == 12
    assert numbers["overlap/prompts"] == 3
    assert not any(name.startswith("ches/") or "/reference/" in name for name in numbers)
    assert f"--output {tmp_path / 'out'}" in (tmp_path / "out/data.html").read_text()
    assert not (tmp_path / "run").exists()


def test_with_the_cache_and_ches_every_section_is_there(
    keys: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["precompute-ref", *keys]) == 0
    assert run(["data", *keys, "--ches", "5", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for title in ("What the reference thinks of the labels", "Why does the chosen log-prob fall?"):
        assert title in printed
        assert f"<h2>{title}</h2>" in (tmp_path / "out/data.html").read_text()
    numbers = json.loads((tmp_path / "out/summary.json").read_text())
    assert numbers["training/reference/known_pairs"] == numbers["training/pairs"]
    assert numbers["ches/pairs"] == 5
    assert 0 < numbers["ches/likeness/median"] < 1.5


def test_json_lines_have_the_numbers(
    keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DPO_OUTPUT", "json")
    assert run(["data", *keys, "--output", str(tmp_path / "out")]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (numbers,) = [event for event in events if event["event"] == "data"]
    assert numbers["training/groups"] == 12


def test_a_number_of_pairs_below_zero_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "--config", "x.yaml", "--ches", "-1"]) == 2
    assert capsys.readouterr().err.startswith("dpo: error: --ches: -1; expected a number of pairs")


def test_labels_are_described_and_have_no_ches(
    keys: list[str], tmp_path: Path, write_jsonl: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"{n} the", "completion": f" {n}", "label": n % 2 == 0} for n in range(6)]
    labels = ["--data.train", write_jsonl(rows, "labels.jsonl"), "--output", str(tmp_path / "out")]
    assert run(["data", *keys, *labels]) == 0
    assert "labelled desirable" in capsys.readouterr().out
    assert run(["data", *keys, *labels, "--ches", "2"]) == 2
    assert "--ches: it compares pairs, and data.train has 6 labelled" in capsys.readouterr().err
