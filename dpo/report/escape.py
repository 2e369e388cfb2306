"""Text of models and prompts, made safe to show: in a Markdown cell, on a terminal, in a table.

What a model writes is data. It is escaped before it enters Markdown, and its control characters are replaced
before it reaches a terminal or a page.
"""

import html
import re
import unicodedata
from collections.abc import Iterator

LONGEST_PROMPT = 400
"""Characters of a prompt's end that the tables show; samples.jsonl has all of it."""


def prompt_end(prompt: str) -> str:
    """A prompt as the tables show it: its last `LONGEST_PROMPT` characters."""
    return prompt if len(prompt) <= LONGEST_PROMPT else "…" + prompt[-LONGEST_PROMPT:]


def markdown_cell(text: str) -> str:
    r"""Text as one cell of a Markdown table, without any markup of its own, in any renderer.

    HTML first, then Markdown; lines are joined by <br>. "a|b" becomes "a\|b", "<script>" "&lt;script&gt;".
    """
    escaped = (html.escape(line, quote=False) for line in visible_lines(text))
    return "<br>".join(re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", line) for line in escaped)


def visible(text: str) -> str:
    """The text with its line breaks, and a replacement character for every other control character."""
    return "\n".join(visible_lines(text))


def visible_lines(text: str) -> Iterator[str]:
    """The lines of `visible`: the escape codes of a terminal become visible characters."""
    for line in text.splitlines():
        yield "".join(
            "\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter) in ("Cc", "Cs") else letter
            for letter in line.expandtabs(4)
        )
