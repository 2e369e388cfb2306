"""The files of a report: report.md, report.html, summary.json, samples.jsonl and the figures.

Each file is replaced atomically (`dpo.files`).
"""

import json
import math
from dataclasses import asdict
from pathlib import Path

from dpo.files import write_file
from dpo.report.content import Report
from dpo.report.figures import save_png
from dpo.report.html import html_page
from dpo.report.markdown import figure_file, markdown


def write_report(report: Report, folder: Path, *, title: str) -> None:
    """Writes the report into `folder`, which is made if it does not exist.

    A number that is not finite is null in summary.json.

    Args:
        report: What was found.
        folder: RUN_DIR/report, or that of a snapshot.
        title: Of the page, such as the run folder.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    finite = {key: value if math.isfinite(value) else None for key, value in report.summary.items()}
    lines = [json.dumps(asdict(row), ensure_ascii=False) for row in report.rows]
    write_file(folder / "summary.json", json.dumps(finite, indent=2) + "\n")
    write_file(folder / "samples.jsonl", "".join(line + "\n" for line in lines))
    for captioned in report.figures:
        save_png(captioned.figure, folder / figure_file(captioned))
    write_file(folder / "report.md", markdown(report))
    write_file(folder / "report.html", html_page(report, title))
