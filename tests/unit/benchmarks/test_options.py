"""docs/options.md says what `dpo.config` says."""

from pathlib import Path

from benchmarks.options import options_page

PAGE = Path(__file__).parents[3] / "docs" / "options.md"


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == options_page(), "python -m benchmarks.options docs/options.md"


def test_every_option_has_a_meaning() -> None:
    rows = [line for line in options_page().splitlines() if line.startswith("| `")]
    assert len(rows) > 80
    assert all(row.split(" | ")[-1].strip(" |") for row in rows)
