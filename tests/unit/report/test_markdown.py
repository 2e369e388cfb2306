"""report.md: its tables, and that nothing a model writes becomes markup."""

from dpo.report.content import PairRow, Provenance, Report, SampleRow, Section
from dpo.report.escape import LONGEST_PROMPT
from dpo.report.markdown import markdown

NASTY = "a|b `c` <script>alert(1)</script> **d** [e](f) &amp;\n\n# g\r\n| h |\x1b[31m"


def row(index: int = 0, **fields: object) -> SampleRow:
    texts = {"prompt": "It was", "reference": " sad.", "policy": " happy."}
    return SampleRow(index=index, seed=7, **{**texts, **fields})  # type: ignore[arg-type]


def report(rows: list[SampleRow], **fields: object) -> Report:
    values = {
        "summary": {"win_rate": 0.9, "win_rate/low": 0.8, "win_rate/high": 0.95, "eval/loss": 0.5},
        "table_rows": 2,
        "provenance": Provenance(
            essentials={"policy": "runs/demo/model"},
            commands=["python -m dpo evaluate --config demo.yaml"],
        ),
    }
    return Report(rows=rows, **{**values, **fields})  # type: ignore[arg-type]


def test_numbers_have_their_intervals_and_the_order_of_the_labels() -> None:
    lines = markdown(report([], summary={"extra": 2.0, **report([]).summary})).splitlines()
    numbers = [line for line in lines if line.startswith("|")][2:5]
    assert numbers == [
        "| held-out loss | 0.500 |  |  |",
        "| win rate of the policy over the reference (a tie counts half) | 0.900 | 0.800 to 0.950 |  |",
        "| extra | 2.000 |  |  |",
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


def test_only_the_end_of_a_long_prompt_is_shown() -> None:
    text = markdown(report([row(prompt="x" * 1000 + "y" * LONGEST_PROMPT)]))
    assert f"| …{'y' * LONGEST_PROMPT} |" in text


def test_pairs_that_are_ranked_wrong_are_listed_with_their_margin() -> None:
    pair = PairRow(prompt="p", chosen="c|", rejected="r", measure="-1.25")
    text = markdown(report([], worst_pairs=[pair]))
    assert "## Where it fails" in text
    assert "| query | chosen | rejected | margin |\n|---|---|---|---|\n| p | c\\| | r | -1.25 |" in text


def test_a_section_on_the_data_has_its_sentences_table_and_pairs() -> None:
    pair = PairRow(prompt="p", chosen="c", rejected="r", measure="-2")
    section = Section(
        title="Lengths",
        notes=["All are *short*."],
        columns=("", "training"),
        rows=[("chosen", "3")],
        measure="nats",
        pairs=[pair],
    )
    assert (
        markdown(report([], data=[section]))
        .split("## What was compared")[0]
        .endswith(
            "## The data\n\n### Lengths\n\nAll are \\*short\\*.\n\n"
            "|   | training |\n|---|---|\n| chosen | 3 |\n\n"
            "| query | chosen | rejected | nats |\n|---|---|---|---|\n| p | c | r | -2 |\n\n"
        )
    )
