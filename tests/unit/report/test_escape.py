"""Text of models: no markup, no control characters, and the end of long prompts."""

import pytest

from dpo.report.escape import LONGEST_PROMPT, markdown_cell, prompt_end, visible


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("a|b", r"a\|b"),
        ("<script>", "&lt;script&gt;"),
        ("**d** [e](f)", r"\*\*d\*\* \[e\](f)"),
        ("one\n\ntwo", "one<br><br>two"),
        ("$x$ ~y~ #z `c` \\", r"\$x\$ \~y\~ \#z \`c\` \\"),
    ],
)
def test_nothing_in_a_cell_is_markup(text: str, cell: str) -> None:
    assert markdown_cell(text) == cell


def test_control_characters_become_visible_and_line_breaks_stay() -> None:
    assert visible("a\x1b[31mb\nc\td") == "a\N{REPLACEMENT CHARACTER}[31mb\nc   d"
    assert visible("\ud800") == "\N{REPLACEMENT CHARACTER}"


def test_only_the_end_of_a_long_prompt_is_kept() -> None:
    assert prompt_end("x" * LONGEST_PROMPT) == "x" * LONGEST_PROMPT
    assert prompt_end("x" + "y" * LONGEST_PROMPT) == "…" + "y" * LONGEST_PROMPT
