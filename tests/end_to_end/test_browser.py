"""report.html and TensorBoard as a person's browser sees them; skipped where there is no Chromium."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from nasty import nasty_report

from dpo.report.html import html_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


def browse(url: str, folder: Path, *options: str) -> tuple[str, str, list[str]]:
    """The page's elements after it was shown, what the browser logged, and the addresses it asked for."""
    log = folder / "network.json"
    command = [
        str(CHROMIUM),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
        f"--log-net-log={log}",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--virtual-time-budget=5000",
        *options,
        "--dump-dom",
        url,
    ]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    events = log.read_text()
    events = events if events.rstrip().endswith("}") else events.rstrip().rstrip(",") + "]}"
    asked = {str(event.get("params", {}).get("url", "")) for event in json.loads(events)["events"]}
    console = "\n".join(line for line in shown.stderr.splitlines() if ":CONSOLE" in line)
    return shown.stdout, console, sorted(filter(None, asked))


@needs_chromium
def test_the_report_shows_its_figures_and_table_and_runs_and_loads_nothing(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(html_page(nasty_report(), "runs/nasty"))
    elements, console, asked = browse(file.as_uri(), tmp_path)
    assert "<title>runs/nasty</title>" in elements  # a script of a sample would have changed it
    assert len(re.findall(r"<svg ", elements)) == 4
    assert "DPO-trained policy" in elements
    assert console == ""
    assert [url for url in asked if url.startswith(("http:", "https:")) and "google" not in url] == []


@needs_chromium
def test_a_page_that_does_run_and_load_would_be_noticed(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(
        "<title>no</title><script>document.title = 'ran'; console.error('said')</script>"
        "<img src='http://localhost:9/x'>"
    )
    elements, console, asked = browse(file.as_uri(), tmp_path)
    assert "<title>ran</title>" in elements
    assert "said" in console
    assert "http://localhost:9/x" in asked
