"""What an option accepts, in words: the type of its field, as an error message names it."""

from dataclasses import is_dataclass
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

PLAIN = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}


def in_words(hint: Any) -> str:
    """`a number above 0`, `one of float32, bfloat16` and the like, for a type with its range."""
    origin, parts = get_origin(hint), get_args(hint)
    if hint in PLAIN:
        return PLAIN[hint]
    if origin is Annotated:
        return " ".join([in_words(parts[0]), *map(repr, parts[1:])]).replace(
            "number at least", "number of at least"
        )
    if origin is Literal:
        return f"one of {', '.join(parts)}" if len(parts) > 1 else parts[0]
    if origin is list and len(get_args(parts[0])) > 1 and get_origin(parts[0]) is not Annotated:
        return "a list of such"
    if origin is list:
        return "a list such as [a, b]" if parts[0] is str else f"a list, each {in_words(parts[0])}"
    if origin is tuple:
        return f"[{', '.join(map(in_words, parts))}]"
    if origin is dict:
        return "names and values, {name: value}"
    if is_dataclass(hint):
        return "{path: ...} with its options"
    return ", or ".join(map(in_words, parts))


def choices(hint: Any) -> list[str]:
    """The words that an option accepts, where it names some."""
    if get_origin(hint) is Literal:
        return [*get_args(hint)]
    return [word for part in get_args(hint) for word in choices(part)]
