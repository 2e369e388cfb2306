"""Configuration from YAML and dotted arguments: jsonargparse is known here and nowhere else.

All problems are found at once, each with its place and, for an unknown key, the nearest legal one.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from dpo.cli.expected import choices, in_words
from dpo.cli.help import help_text, sections_of
from dpo.cli.table import CONFIGURED
from dpo.cli.validate import problems
from dpo.config import Config, SftConfig
from dpo.config.foreign import meant, nearest
from dpo.errors import UserError


class _Leaf(NamedTuple):
    """One option of a configuration class."""

    type: Any
    ranged: Any
    """The same with the ranges of its numbers."""
    required: bool
    needed_with: str
    """The optional branch it lies in, with its dot: a required option in it is, once anything of it is
    given.
    """


def parse(command: str, arguments: Sequence[str]) -> Config | SftConfig:
    """The configuration of a command from its arguments.

    Raises:
        UserError: Everything that is wrong, one problem a line.
        SystemExit: With status 0, after --help or --print_config.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    kind: type[Config] | type[SftConfig] = SftConfig if command == "sft" else Config
    parser = ArgumentParser(prog=f"dpo {command}", description=CONFIGURED[command], exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_class_arguments(kind)
    if files := [value for key, value in _words(arguments) if key == "config"]:
        parser.set_defaults(run_dir=f"runs/{Path(files[-1]).stem}")
    if asked := [word for word in arguments if word in ("-h", "--help") or word.endswith(".help")]:
        _print_help(command, kind, asked[0])
    found = [*_problems_of_keys(kind, arguments), *_problems_of_values(kind, arguments)]
    namespace = Namespace()
    if not found:
        try:
            namespace = parser.parse_args(list(arguments))
        except (ArgumentError, TypeError, ValueError) as error:
            found = [_short(str(error))]
    if not found:
        config: Config | SftConfig = kind(
            **{k: v for k, v in _built(parser, namespace).items() if k != "config"}
        )
        found = problems(config)
        if not found:
            return config
    raise _refusal(found)


def checked(config: Config) -> Config:
    """A configuration that was made in Python, after the checks that one in a file goes through.

    Returns:
        The same options; numbers that were given as text are numbers.

    Raises:
        UserError: Everything that is wrong, one problem a line.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    kind, given = type(config), asdict(config)
    leaves = _leaves(kind)
    problems_of = (
        _problem_of_type(key, leaves[key], value, as_text=False)
        for key, value in _flat(given, "", set(leaves))
        if key in leaves  # not an optional section that is left out
    )
    found = [problem for problem in problems_of if problem]
    if not found:
        parser = ArgumentParser(exit_on_error=False)
        parser.add_class_arguments(kind)
        config = kind(**_built(parser, parser.parse_object(given)))
        found = problems(config)
    if found:
        raise _refusal(found)
    return config


def _print_help(command: str, kind: type, asked: str) -> NoReturn:
    """Prints the help for all keys, or for a section such as --model.lora.help."""
    section = asked.removeprefix("--").removesuffix("help").rstrip(".") if asked.endswith(".help") else ""
    if section and section not in sections_of(kind):
        raise UserError(f"{asked}: no such section; expected one of {', '.join(sections_of(kind))}")
    print(help_text(command, CONFIGURED[command], kind, section), end="")
    raise SystemExit(0)


def _refusal(found: Sequence[str]) -> UserError:
    noun = "problem" if len(found) == 1 else "problems"
    listed = "".join(f"\n  {problem}" for problem in found)
    return UserError(f"{len(found)} {noun} in the configuration:{listed}")


def _built(parser: ArgumentParser, namespace: Namespace) -> dict[str, Any]:
    return dict(vars(parser.instantiate(namespace)))


def _problems_of_keys(kind: type, arguments: Sequence[str]) -> Iterator[str]:
    """Unreadable files, words without a key, and unknown keys, in files and among the arguments."""
    yield from (_without_key(word) for key, word in _words(arguments) if not key)
    leaves = _leaves(kind)
    for place, key, value in _given(kind, arguments):
        branch = any(known.startswith(f"{key}.") for known in leaves)
        if key in leaves:
            yield from _problems_of_items(f"{place}{key}", value, leaves[key].type)
        elif branch and value is None and _branch_is_optional(key, leaves):
            continue  # `scratch: null`, as --print_config writes it
        elif branch:
            yield f"{place}{key}: {value!r}; expected keys below it, such as {_nearest_below(key, leaves)}"
        else:
            yield f"{place}{key}: unknown key{nearest(key, set(leaves))}"


def _problems_of_items(place: str, value: Any, expected: Any) -> Iterator[str]:
    """Unknown keys of a mapping, or of the mappings in a list: the {path, weight} of a source."""
    names = {field.name for part in get_args(expected) if is_dataclass(part) for field in fields(part)}
    items = (
        [(f"{place}[{index}]", item) for index, item in enumerate(value)] if isinstance(value, list) else []
    )
    for where, item in [(place, value), *items] if names else []:
        for name in item if isinstance(item, dict) else []:
            if name not in names:
                yield f"{where}.{name}: unknown key{nearest(str(name), names)}"


def _branch_is_optional(key: str, leaves: Mapping[str, _Leaf]) -> bool:
    return all(
        leaf.needed_with.startswith(f"{key}.") for name, leaf in leaves.items() if name.startswith(f"{key}.")
    )


def _nearest_below(key: str, leaves: Mapping[str, _Leaf]) -> str:
    return next(name for name in leaves if name.startswith(f"{key}."))


def _problems_of_values(kind: type, arguments: Sequence[str]) -> Iterator[str]:
    """Each value that has the wrong type on its own, and each required key that is missing."""
    leaves = _leaves(kind)
    given: set[str] = set()
    for place, key, value in _given(kind, arguments):
        given.add(key)
        if key in leaves and (problem := _problem_of_type(key, leaves[key], value, as_text=not place)):
            yield f"{place}{problem}"
    for key, leaf in leaves.items():
        branch_given = any(name.startswith(leaf.needed_with) for name in given)
        if leaf.required and key not in given and branch_given | (leaf.needed_with == ""):
            yield f"{key}: required"


def _problem_of_type(key: str, leaf: _Leaf, value: Any, *, as_text: bool) -> str:
    """What is wrong with the type of a value, which is text on the command line; nothing if it is right."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=leaf.type)
    try:
        parser.parse_args([f"--value={value}"]) if as_text else parser.parse_object({"value": value})
    except (ArgumentError, TypeError, ValueError):
        return f"{key}: {value!r}; expected {in_words(leaf.ranged)}{meant(key, value, choices(leaf.type))}"
    return ""


def _given(kind: type, arguments: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """(place, dotted key, value) of everything the user gave: config files flattened, then arguments."""
    legal = set(_leaves(kind))
    for key, value in _words(arguments):
        if key == "config":
            yield from ((f"{value}: ", *entry) for entry in _flat(_read_yaml(value), "", legal))
        elif key:
            yield "", key, value


def _words(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, value) of the arguments, in their order; a word that follows no key has an empty one."""
    words = list(arguments)
    while words:
        word = words.pop(0)
        key, separator, value = word[2:].partition("=")
        if not word.startswith("--"):
            if word != "-h":
                yield "", word
        elif key not in ("help", "print_config"):
            takes_next = not separator and bool(words) and not words[0].startswith("--")
            yield key, words.pop(0) if takes_next else value


def _without_key(word: str) -> str:
    """What to write instead of a word that follows no key."""
    place, meant_key = Path(word), ""
    if place.suffix in (".yaml", ".yml"):
        meant_key = "--config"
    elif (place / "config.yaml").is_file():
        meant_key, word = "--config", str(place / "config.yaml")
    elif place.exists():
        meant_key = "--data.train"
    hint = f"; did you mean {meant_key} {word}?" if meant_key else ""
    return f"{place}: a word without a key; expected --KEY VALUE, or --config FILE{hint}"


def _read_yaml(name: str) -> dict[str, Any]:
    try:
        text = Path(name).read_text()
        tree = yaml.safe_load(text)
        twice = _duplicate_keys(yaml.compose(text, Loader=yaml.SafeLoader))
    except OSError as error:
        raise UserError(f"--config: {name}: {error.strerror}; expected a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config: {name}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"--config: {name}: expected keys and values, got {type(tree).__name__}")
    if twice:  # YAML would take the last one without a word
        raise UserError("\n".join(f"--config: {name}: {problem}" for problem in twice))
    return tree


def _duplicate_keys(root: yaml.Node | None) -> list[str]:
    """Keys that a file has twice, at any depth, nested or dotted; what `<<` merges in may be overridden."""
    lines: dict[str, int] = {}
    found: list[str] = []
    walked: set[int] = set()  # an alias is the node of its anchor

    def walk(node: yaml.Node | None, place: str) -> None:
        if id(node) in walked:
            return
        walked.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                walk(item, f"{place}[{index}]")
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.tag != "tag:yaml.org,2002:merge":
                name, line = f"{place}.{key.value}".removeprefix("."), key.start_mark.line + 1
                if name in lines:
                    again = f"in line {lines[name]} and again in line {line}"
                    found.append(f"{name}: {again}; expected once: join the two")
                lines.setdefault(name, line)
                walk(value, name)

    walk(root, "")
    return found


def _flat(tree: dict[str, Any], prefix: str, legal: set[str]) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in legal:
            yield from _flat(value, f"{key}.", legal)
        else:
            yield key, value


def _leaves(kind: type, prefix: str = "", optional_branch: str = "") -> dict[str, _Leaf]:
    """Dotted key -> option, over all options of a configuration class."""
    found: dict[str, _Leaf] = {}
    hints, ranged = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for field in fields(kind):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        parts = [part for part in get_args(hint) or (hint,) if part is not type(None)]
        if len(parts) == 1 and is_dataclass(parts[0]):  # a section, or one that may be left out
            branch = optional_branch if parts[0] is hint else f"{key}."
            found |= _leaves(parts[0], f"{key}.", branch)  # type: ignore[arg-type]
        else:
            required = field.default is field.default_factory
            found[key] = _Leaf(hint, ranged[field.name], required, optional_branch)
    return found


def _short(message: str) -> str:
    """Jsonargparse's explanation without its preamble and Python's way of naming types."""
    lines = [
        line.strip() for line in message.splitlines() if line.strip() and not line.startswith("Parser key")
    ]
    return re.sub(r"<class '(\w+)'>", r"\1", "; ".join(lines[:2])).replace("typing.", "") or message
