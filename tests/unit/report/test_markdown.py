"""The report in Markdown: its files, its tables, and that nothing a model writes becomes markup."""

import json
import math
from pathlib import Path

import pytest

from dpo.report.content import Report, SampleRow
from dpo.report.markdown import LONGEST_PROMPT, markdown, terminal_table, write_report

NASTY = "a|b `c` <script>alert(1)</script> **d** [e](f) &amp;\n\n# g\r\n| h |\x1b[31m"


def row(index: int = 0, **fields: object) -> SampleRow:
    texts = {"prompt": "It was", "reference": " sad.", "policy": " happy."}
    return SampleRow(index=index, seed=7, **{**texts, **fields})  # type: ignore[arg-type]


def report(rows: list[SampleRow], **fields: object) -> Report:
    values = {
        "summary": {"win_rate": 0.9, "win_rate/low": 0.8, "win_rate/high": 0.95, "eval/loss": 0.5},
        "table_rows": 2,
        "essentials": {"policy": "runs/demo/model"},
        "commands": ["python -m dpo evaluate --config demo.yaml"],
    }
    return Report(rows=rows, **{**values, **fields})  # type: ignore[arg-type]


def test_the_folder_holds_the_summary_every_sample_and_the_report(tmp_path: Path) -> None:
    rows = [row(0, reference_score=-0.5, policy_score=0.75), row(1), row(2, prompt=NASTY)]
    write_report(report(rows), tmp_path / "report")
    assert {path.name for path in (tmp_path / "report").iterdir()} == {
        "report.md",
        "figures",
        "summary.json",
        "samples.jsonl",
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


def test_a_second_report_replaces_the_first(tmp_path: Path) -> None:
    write_report(report([row()]), tmp_path)
    write_report(report([row()], summary={"eval/loss": 0.25}), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"eval/loss": 0.25}


def test_a_number_that_is_not_finite_is_null_in_json(tmp_path: Path) -> None:
    write_report(report([], summary={"eval/loss": math.nan, "kl/token": math.inf}), tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"eval/loss": None, "kl/token": None}


def test_headline_numbers_carry_their_intervals_in_the_order_of_the_summary() -> None:
    lines = markdown(report([], summary={"extra": 2.0, **report([]).summary})).splitlines()
    numbers = [line for line in lines if line.startswith("|")][2:]
    assert numbers == [
        "| held-out loss | 0.500 |  |",
        "| policy scores higher than reference (a tie is half) | 0.900 | 0.800 to 0.950 |",
        "| extra | 2.000 |  |",
    ]


def test_the_report_names_the_seed_the_essentials_and_the_commands() -> None:
    text = markdown(report([row()]))
    assert "with seed 7" in text
    assert "- policy: runs/demo/model" in text
    assert "\n    python -m dpo evaluate --config demo.yaml\n" in text


def test_the_table_shows_the_first_rows_with_their_scores() -> None:
    rows = [row(n, prompt=f"prompt {n}", reference_score=-0.5, policy_score=0.75) for n in range(3)]
    text = markdown(report(rows))
    assert "| query | reference policy | DPO-trained policy |" in text
    assert "| prompt 0 | **-0.50**<br> sad. | **+0.75**<br> happy. |" in text
    assert "prompt 1" in text
    assert "prompt 2" not in text


def test_a_report_without_samples_has_no_table_of_them() -> None:
    assert "query" not in markdown(report([]))


def test_nothing_that_a_model_writes_becomes_markup() -> None:
    escaped = (
        r"a\|b \`c\` &lt;script&gt;alert(1)&lt;/script&gt; \*\*d\*\* \[e\](f) &amp;amp;<br><br>"
        r"\# g<br>\| h \|" + "\N{REPLACEMENT CHARACTER}" + r"\[31m"
    )
    text = markdown(report([row(prompt=NASTY, reference=NASTY, policy=NASTY)]))
    assert f"| {escaped} | {escaped} | {escaped} |" in text.splitlines()


def test_a_long_prompt_is_shown_by_its_end() -> None:
    text = markdown(report([row(prompt="x" * 1000 + "y" * LONGEST_PROMPT)]))
    assert f"| …{'y' * LONGEST_PROMPT} |" in text


def test_terminal_cells_are_wrapped_into_columns_of_equal_width() -> None:
    rows = [row(3, prompt="one two three four five", reference_score=-0.5, policy_score=0.75)]
    # 60 columns less two separators of 3 are three cells of 18.
    assert terminal_table(rows, 60).splitlines() == [
        "query              | reference policy   | DPO-trained policy",
        "-------------------+--------------------+-------------------",
        "#3                 | -0.50              | +0.75",
        "one two three four |  sad.              |  happy.",
        "five               |                    |",
        "-------------------+--------------------+-------------------",
    ]


@pytest.mark.parametrize("width", [10, 60, 83, 200])
def test_no_line_of_the_terminal_table_is_longer_than_the_terminal(width: int) -> None:
    rows = [row(prompt="word " * 50 + "x" * 300, reference=NASTY, policy="")]
    table = terminal_table(rows, width)
    assert max(map(len, table.splitlines())) <= max(width, 60)
    assert "\x1b" not in table


def test_without_scores_the_terminal_table_has_texts_only() -> None:
    assert "#" not in terminal_table([row()], 80)
