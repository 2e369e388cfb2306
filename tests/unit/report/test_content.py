"""The rows that a report shows, and the sentence above them."""

from dpo.report.content import Provenance, Report, SampleRow


def test_only_the_first_rows_are_shown_and_their_seeds_are_named() -> None:
    rows = [SampleRow(index=n, seed=7 + n // 2, prompt="p", reference="r", policy="q") for n in range(4)]
    report = Report(summary={}, rows=rows, table_rows=3, provenance=Provenance(essentials={}, commands=[]))
    assert [row.index for row in report.shown] == [0, 1, 2]
    assert "first 3 held-out prompts" in report.samples_note
    assert "seed 7, 8" in report.samples_note
