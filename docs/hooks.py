"""Hooks of mkdocs: pages that live outside docs/, and links that hold in the repository and on the site."""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "launch/README.md": "launch.md",
    "benchmarks/gpu/README.md": "gpu-run.md",
}
"""File of the repository -> its page."""
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds the pages that live outside docs/."""
    for source, page in ELSEWHERE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between files of the repository into links between pages.

    A link to a file or folder that has no page becomes its text; one that leads nowhere stays, and mkdocs
    reports it.
    """
    homes = {page: source for source, page in ELSEWHERE.items()}
    source = PurePosixPath(homes.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    here = PurePosixPath(page.file.src_uri).parent

    def rewritten(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if "://" in target:
            return match[0]
        aimed = os.path.normpath(source.parent / target)
        if (home := page_of(aimed)) is not None:
            return f"{text}({os.path.relpath(home, here)}{anchor})"
        return text[1:-1] if (ROOT / aimed).exists() else match[0]

    return LINK.sub(rewritten, markdown)


def page_of(name: str) -> str | None:
    """The page or picture of a file of the repository, below the site's root; None if it has none."""
    inside = name.removeprefix("docs/")
    return ELSEWHERE.get(name) or (inside if name != inside and (ROOT / name).is_file() else None)
