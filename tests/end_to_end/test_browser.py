"""report.html in a real browser; skipped if Chromium is not installed."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from nasty import nasty_report

from dpo.report.html import html_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def browse(url: str, folder: Path, *options: str) -> tuple[str, str, list[str]]:
    """The page's DOM after rendering, the console output, and the URLs that the browser requested."""
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
    requested = {str(event.get("params", {}).get("url", "")) for event in json.loads(events)["events"]}
    console = "\n".join(line for line in shown.stderr.splitlines() if ":CONSOLE" in line)
    return shown.stdout, console, sorted(filter(None, requested))


@needs_chromium
def test_the_report_shows_figures_and_table_and_runs_no_script(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(html_page(nasty_report(), "runs/nasty"))
    dom, console, requested = browse(file.as_uri(), tmp_path)
    assert "<title>runs/nasty</title>" in dom  # a script in a sample would have changed it
    assert len(re.findall(r"<svg ", dom)) == 5
    assert "DPO-trained policy" in dom
    assert console == ""
    assert [url for url in requested if url.startswith(("http:", "https:")) and "google" not in url] == []


@needs_chromium
def test_the_browser_detects_scripts_and_requests(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    file.write_text(
        "<title>no</title><script>document.title = 'ran'; console.error('logged')</script>"
        "<img src='http://localhost:9/x'>"
    )
    dom, console, requested = browse(file.as_uri(), tmp_path)
    assert "<title>ran</title>" in dom
    assert "logged" in console
    assert "http://localhost:9/x" in requested
