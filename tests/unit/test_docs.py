"""What the documentation says about tests: every file and test that it names is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"\btests/[\w/]*\w+(?:\.py|/)", text):
        assert (ROOT / name).exists(), name
    for file, test in re.findall(r"(\w+\.py)::(test_\w+)", text):
        files = [path.read_text() for path in ROOT.glob(f"tests/**/{file}")]
        assert any(f"def {test}(" in code for code in files), f"{file}::{test}"
