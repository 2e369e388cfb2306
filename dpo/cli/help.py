"""What `dpo COMMAND --help` prints: every key with its type, default and meaning, to the terminal's width."""

import re
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from docstring_parser import parse_from_object

from dpo.cli.expected import in_words

LABEL = re.compile(r" *\S+(?: \S+)*?  +(?=\S)")
"""What stands before a text, parted from it by two spaces."""
USAGE_INDENT = 11
HEAD = """usage: dpo {command} --config FILE [--KEY VALUE ...]

{summary}

--config FILE    YAML with any of the keys below; may be given several times
--KEY VALUE      one key, which counts above the files: --train.seed 7
--print_config   print the whole configuration and end
--quiet          only warnings, errors and the summary
--json_lines     standard output has one JSON object a line
--SECTION.help   this text for a section alone: --model.lora.help
"""


def help_text(command: str, summary: str, kind: type, section: str = "") -> str:
    """The text for a command, or for a section of its configuration.

    Args:
        command: Its name.
        summary: What it is for.
        kind: Its configuration class.
        section: A dotted name such as model.lora; empty for all of it.
    """
    width = min(shutil.get_terminal_size((80, 24)).columns, 100)
    parts = [
        part
        for name, part in _sections(kind, "", width)
        if f"{name}.".startswith(f"{section}.") or not section
    ]
    head = "" if section else HEAD.format(command=command, summary=summary) + "\n"
    return head + "\n\n".join(parts) + "\n"


def sections_of(kind: type) -> list[str]:
    """Names of all sections of a configuration class, such as model and model.lora."""
    return [name for name, _ in _sections(kind, "", 80) if name]


def _sections(kind: type, name: str, width: int) -> Iterator[tuple[str, str]]:
    """A section's own keys, then its sections: name -> text."""
    hints = get_type_hints(kind, include_extras=True)
    nested = {field.name: part for field in fields(kind) for part in [_section(hints[field.name])] if part}
    meanings = _meanings(kind)
    lines = [f"{name}: {' '.join((kind.__doc__ or '').split())}"] if name else []
    for field in fields(kind):
        if field.name not in nested:
            key = f"{name}.{field.name}".lstrip(".")
            lines.append(f"  --{key}  {in_words(hints[field.name])}{_default(field)}")
            lines += textwrap.wrap(
                meanings[field.name], width - 6, initial_indent=" " * 6, subsequent_indent=" " * 6
            )
    wrapped = (
        textwrap.wrap(line, width, subsequent_indent=" " * 4) if len(line) > width else [line]
        for line in lines
    )
    yield name, "\n".join(part for parts in wrapped for part in parts)
    for field in fields(kind):
        if field.name in nested:
            yield from _sections(nested[field.name], f"{name}.{field.name}".lstrip("."), width)


def _section(hint: Any) -> Any:
    """The class of a section, also of one that may be left out; None for a plain option."""
    parts = [part for part in get_args(hint) or (hint,) if part is not type(None)]
    return parts[0] if len(parts) == 1 and is_dataclass(parts[0]) else None


def _meanings(kind: type) -> dict[str, str]:
    """Option -> its docstring, also of inherited options."""
    return {
        option.arg_name: " ".join((option.description or "").split())
        for base in reversed(kind.__mro__)
        if is_dataclass(base)
        for option in parse_from_object(base).params
    }


def _default(field: Any) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return "; required"
    value = field.default if field.default is not MISSING else field.default_factory()
    if value is None:
        return ""
    shown = (
        str(value).lower() if isinstance(value, bool) else list(value) if isinstance(value, tuple) else value
    )
    return f"; default: {shown}" if value != "" else ""


def fitted(usage: str, width: int | None = None) -> str:
    """A usage text, written in lines of any length, to the terminal's width.

    Prose is filled; a label with its text, parted by two spaces, keeps its column; brackets are not broken.

    Args:
        usage: As the commands with options of their own have it.
        width: Default: the terminal's, at most 100.
    """
    width = width or min(shutil.get_terminal_size((80, 24)).columns, 100)
    entries: list[tuple[str, int]] = []  # text, and the column of its further lines
    for line in usage.splitlines():
        text, label = line.strip(), LABEL.match(line)
        is_usage = line.startswith(("usage: ", "       dpo "))
        if not text or label or is_usage or not entries or not entries[-1][0]:
            entries.append((line.rstrip(), label.end() if label else USAGE_INDENT if is_usage else 0))
        else:
            entries[-1] = (f"{entries[-1][0]} {text}", entries[-1][1])
    return "".join(f"{line}\n" for text, column in entries for line in _filled(text, column, width))


def _filled(text: str, column: int, width: int) -> list[str]:
    whole = re.sub(r"\[[^]]*\]", lambda found: found[0].replace(" ", "\0"), text)
    label = LABEL.match(whole)
    indent = label.end() if label else len(whole) - len(whole.lstrip())
    head, body = whole[:indent], whole[indent:]
    lines = textwrap.wrap(
        body,
        width,
        initial_indent=head,
        subsequent_indent=" " * column,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\0", " ") for line in lines or [""]]
