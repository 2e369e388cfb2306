"""docs/options.md: every option of the configuration, read off `dpo.config`.

python -m benchmarks.options docs/options.md
"""

import argparse
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from docstring_parser import parse_from_object

from dpo.config import Config, SftConfig, SftModelConfig, SftTrainConfig, Within

HEAD = """# Options

Every key of a configuration file, and of the command line by its dotted name (`--train.learning_rate 1e-6`).
Made from `dpo/config/` by `python -m benchmarks.options docs/options.md`; `dpo COMMAND --help` says the same.
"""
SFT_HEAD = """## `dpo sft`

Next-token training has the sections `model`, `data` and `train`. What differs from the above:
"""


def options_page() -> str:
    """The page in Markdown."""
    parts = [HEAD, "## Top level\n", _table(Config, ""), *_sections(Config, "")]
    parts += [SFT_HEAD, _table(SftConfig, "")]
    for kind, prefix in ((SftModelConfig, "model."), (SftTrainConfig, "train.")):
        own = [field.name for field in fields(kind) if field.name in kind.__annotations__]
        parts += [_table(kind, prefix, only=own)]
        parts += [part for part in _sections(kind, prefix) if "scratch" in part]
    return "\n".join(parts)


def _sections(kind: type, prefix: str) -> Iterator[str]:
    """A heading, what it is, and a table for each nested section."""
    for field in fields(kind):
        section = _section_of(get_type_hints(kind)[field.name])
        if section is not None:
            key = f"{prefix}{field.name}"
            about = " ".join((section.__doc__ or "").split())
            optional = " Left out by default." if field.default is None else ""
            yield f"## `{key}`\n\n{about}{optional}\n\n{_table(section, f'{key}.')}"
            yield from _sections(section, f"{key}.")


def _table(kind: type, prefix: str, *, only: list[str] | None = None) -> str:
    """Key, type, default and meaning of the options of a section, without its nested ones."""
    hints = get_type_hints(kind, include_extras=True)
    meanings = {
        option.arg_name: " ".join((option.description or "").split())
        for base in reversed(kind.__mro__)
        if is_dataclass(base)
        for option in parse_from_object(base).params
    }
    rows = [
        f"| `{prefix}{field.name}` | {_shown_type(hints[field.name])} | {_default(field)} "
        f"| {_escaped(meanings[field.name])} |"
        for field in fields(kind)
        if _section_of(hints[field.name]) is None and (only is None or field.name in only)
    ]
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _section_of(hint: Any) -> type | None:
    """The class of a nested section, also of one that may be left out; None for an option."""
    parts = [part for part in get_args(hint) or (hint,) if part is not type(None)]
    return parts[0] if len(parts) == 1 and is_dataclass(parts[0]) else None  # type: ignore[return-value]


def _shown_type(hint: Any) -> str:
    """A type in words: a number and its range, the names of a choice, text, true or false."""
    arguments = get_args(hint)
    if hasattr(hint, "__metadata__"):
        (within,) = [extra for extra in hint.__metadata__ if isinstance(extra, Within)]
        kind = "whole number" if arguments[0] is int else "number"
        return f"{kind} {within!r}"
    if get_origin(hint) is list:
        return f"list of {_shown_type(arguments[0])}"
    if get_origin(hint) is dict:
        return "mapping"
    if get_origin(hint) is tuple:
        return f"{len(arguments)} x {_shown_type(arguments[0])}"
    if arguments and all(isinstance(one, str) for one in arguments):
        return ", ".join(f"`{one}`" for one in arguments)
    if arguments:
        shown = [_shown_type(one) for one in arguments if one is not type(None)]
        return _escaped(" or ".join(dict.fromkeys(shown)))
    if is_dataclass(hint):
        return "mapping"
    return {str: "text", bool: "true or false", int: "whole number", float: "number"}[hint]


def _default(field: "Field[Any]") -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return "required"
    value = field.default if field.default_factory is MISSING else field.default_factory()
    if value is None or value == "":
        return ""
    if isinstance(value, list | tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _escaped(text: str) -> str:
    """Text in a table of Markdown."""
    return re.sub(r"([|<>])", r"\\\1", text)


def main() -> None:
    """Writes the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.parse_args().output.write_text(options_page())


if __name__ == "__main__":
    main()
