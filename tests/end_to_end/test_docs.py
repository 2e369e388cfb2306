"""The documentation as a site: links lead somewhere, a dead one is seen, no page asks the network."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEAD = "\n[no file](nowhere.md) [no heading](data.md#nowhere) [no folder](../nowhere/)\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The built site of a copy with three dead links, and what the build printed."""
    copy = tmp_path_factory.mktemp("project")
    for folder in ("docs", "dpo", "launch", "configs", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CONTRIBUTING.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, copy / name)
    with (copy / "docs" / "glossary.md").open("a") as glossary:
        glossary.write(DEAD)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build"],
        cwd=copy, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return copy / "site", done.stderr


def test_only_dead_links_are_reported(site: tuple[Path, str]) -> None:
    warnings = re.findall(r"WARNING.*", site[1])  # make docs stops at any
    assert len(warnings) == 3, warnings
    assert all(
        any(dead in one for one in warnings) for dead in ("nowhere.md'", "nowhere/'", "data.md#nowhere")
    )


def test_pages_ask_the_network_for_nothing(site: tuple[Path, str]) -> None:
    pages = sorted(site[0].glob("*.html"))
    assert {"index.html", "options.html", "launch.html", "python.html"} <= {page.name for page in pages}
    for page in pages:
        asked = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"(https?:[^\"]+)", page.read_text())
        asked += re.findall(
            r"<link[^>]*rel=\"(?:stylesheet|preconnect)\"[^>]*href=\"(https?:[^\"]+)", page.read_text()
        )
        assert asked == [], page.name
    python = (site[0] / "python.html").read_text()
    assert all(
        f"Experiment.{name}" in python for name in ("open_data", "precompute_ref", "train", "evaluate")
    )
