"""The studies' tables and figures from made-up run folders."""

import json
from pathlib import Path

import pytest

from benchmarks import study_report
from benchmarks.study_harmless_tables import fold_interval
from benchmarks.study_sentiment_tables import equal_kl_table, rounding_table, second_judge_table


def _run(folder: Path, accuracy: float, steps: int = 2) -> None:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "README.md").touch()
    lines = [
        # 10 pairs and 100 tokens a step
        {"step": step, "train/loss": 0.5, "train/num_tokens": 100 * step}
        | {"perf/pairs_per_second": 5.0, "perf/tokens_per_second": 50.0}
        for step in range(1, steps + 1)
    ]
    lines.append({"step": steps, "eval/rewards/accuracies": accuracy})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _report(folder: Path, kl: float, score: float) -> None:
    numbers = {"kl/sequence": kl, "score/policy": score, "score/reference": 0.1, "win_rate": 0.6}
    numbers |= {"positive_share/policy": 0.7, "eval/rewards/accuracies": 0.6}
    numbers |= {f"{name}/{end}": value for name, value in numbers.items() for end in ("low", "high")}
    numbers |= {"distinct_2/policy": 0.8, "perplexity/policy_samples": 90.0}
    (folder / "report").mkdir(parents=True)
    (folder / "report" / "summary.json").write_text(json.dumps(numbers))


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["study_report", "--name", "books", "--harmless", "hh"])
    return Path("runs") / "books"


def test_a_baseline_is_compared_at_its_own_kl(runs: Path) -> None:
    _report(runs / "frontier" / "beta_0.1" / "snapshots" / "step_00000035", 1.0, 0.3)
    _report(runs / "frontier" / "beta_0.1", 3.0, 0.5)
    _report(runs / "sft_3e-5", 0.5, 0.15)
    _report(runs / "sft_3e-4", 2.0, 0.2)
    table = equal_kl_table(runs).splitlines()
    assert table[0].endswith("| its score | DPO, beta 0.1 |")
    # From the reference (0 nats, 0.1) to (1, 0.3) at 0.5 nats: 0.2; from (1, 0.3) to (3, 0.5) at 2: 0.4.
    assert [line.split(" | ")[-1] for line in table[2:]] == [
        "0.200 [0.200, 0.200] |",
        "0.400 [0.400, 0.400] |",
    ]


def test_what_is_not_there_is_left_out_and_the_rest_is_written(runs: Path) -> None:
    _run(runs / "frontier" / "beta_0.1", 0.62, steps=4)
    _report(runs / "frontier" / "beta_0.1", 3.0, 0.5)
    _run(runs / "steps_3", 0.55)
    for number in range(1, 6):
        _run(runs.parent / "hh" / f"fold_{number}" / "dpo", 0.6 + number / 100)
        _run(runs.parent / "hh" / f"fold_{number}" / "ipo", 0.61 + number / 100)
    _run(runs.parent / "hh" / "fold_1" / "simpo", 0.9)  # of one fold only
    study_report.main()
    text = Path("runs/books_report/tables.md").read_text()
    assert "| 20 | 0.550 |\n| 40 | 0.620 |" in text
    assert "| ipo | 0.620 0.630 0.640 0.650 0.660 | 0.640" in text
    assert "+0.010 [+0.010, +0.010]" in text
    assert "simpo" not in text
    assert {file.name for file in Path("runs/books_report").iterdir()} == {
        "tables.md",
        "numbers.json",
        "accuracy_against_pairs.png",
        "sentiment_frontier.png",
    }


def test_the_second_judge_is_shown_for_snapshots_too(runs: Path) -> None:
    run = runs / "frontier" / "beta_0.1"
    for folder, share in ((run / "snapshots" / "step_00000035", 0.5), (run, 0.75)):
        numbers = {"score/policy": share, "positive_share/policy": share, "win_rate": share}
        numbers |= {f"{name}/{end}": share for name in [*numbers] for end in ("low", "high")}
        (folder / "report").mkdir(parents=True)
        (folder / "report" / "second_judge.json").write_text(json.dumps(numbers))
    rows = second_judge_table(runs).splitlines()[2:]
    assert [row.split(" | ")[:2] for row in rows] == [
        ["| DPO, beta 0.1, step 35", "0.500 [0.500, 0.500]"],
        ["| DPO, beta 0.1", "0.750 [0.750, 0.750]"],
    ]


def test_the_interval_of_five_folds_is_students() -> None:
    # Deviations -2, -1, 0, 1, 2: standard deviation sqrt(10 / 4), over sqrt(5), times 2.776.
    interval = fold_interval([1, 2, 3, 4, 5])
    assert interval == pytest.approx((3, 3 - 2.776 * 0.5**0.5, 3 + 2.776 * 0.5**0.5))


def test_losses_are_averaged_over_ten_steps_of_the_runs_that_are_there(runs: Path) -> None:
    for name, loss in {"frontier/beta_0.1": 0.6, "float32": 0.5}.items():
        (runs / name).mkdir(parents=True)
        lines = [{"step": step, "train/loss": loss + 0.01 * (step % 2)} for step in range(1, 26)]
        (runs / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert rounding_table(runs).splitlines() == [
        "| steps | bfloat16 | float32 |",
        "|---|---|---|",
        "| 1 to 10 | 0.6050 | 0.5050 |",
        "| 11 to 20 | 0.6050 | 0.5050 |",
    ]
    assert len(rounding_table(runs / "none").splitlines()) == 2
