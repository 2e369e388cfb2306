"""The command line: configuration in, exit status out.

YAML and dotted overrides become a `Config`; all problems of it are shown at once. Commands are imported late,
so that `--help` does not load torch. Exit status: 0 done, 2 bad usage, configuration or data, 3 stopped by a
signal after saving, 1 anything else; rank 0 also writes it to RUN_DIR/exit.json, because `accelerate launch`
turns every failure into 1.
"""

import argparse
import difflib
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast, get_args, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from dpo.config import Config, SftConfig, problems
from dpo.ending import record_end
from dpo.errors import RunFailed, StoppedBySignal, UserError

COMMANDS = {
    "sft": "train a model on text or on chosen completions, also from random weights",
    "precompute-ref": "fill the cache of reference log-probabilities",
    "train": "optimize the policy on preferences, reading the cache",
    "evaluate": "held-out metrics, samples side by side, and the report",
}
USAGE = """usage: dpo COMMAND --config FILE [--KEY VALUE ...]

Direct Preference Optimization with an offline reference cache.

commands:
{commands}
  cache ACTION     info, verify or prune: look after the reference cache; see dpo cache --help
  check [COMMAND]  validate a configuration and its data for COMMAND (default: train); loads no model

dpo COMMAND --help lists every key. Several processes: accelerate launch --config_file launch/cpu.yaml -m dpo
...
"""


CACHE_USAGE = """usage: dpo cache info   FOLDER | --config FILE [--KEY VALUE ...]
       dpo cache verify FOLDER | --config FILE [--KEY VALUE ...] [--recompute N]
       dpo cache prune  FOLDER | --config FILE [--KEY VALUE ...] [--and_config FILE ...] [--dry_run]

FOLDER is a cache (it holds identity.json) or a root with caches in it; FILE is an experiment, as for train.

info    identity, rows, bytes and shards; with FILE also how much of its data is covered
verify  reads every shard and checks it; --recompute computes N random rows of FILE's data anew and compares
prune   joins small shards; with FILE also drops the rows that neither it nor any --and_config needs
"""


class _Leaf(NamedTuple):
    """One option of a configuration class."""

    type: Any
    required: bool
    needed_with: str
    """The optional branch it lies in, with its dot: a required option in it is, once anything of it is
    given.
    """


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status."""
    commands = "\n".join(f"  {name:<16} {summary}" for name, summary in COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(commands=commands))
        return 0 if arguments else 2
    command, *rest = arguments
    if command == "cache":
        return _cache(rest)
    run_dir: Path | None = None
    started = time.time()
    try:
        checking = command == "check"
        if checking:
            command = rest.pop(0) if rest and not rest[0].startswith("-") else "train"
        if command not in COMMANDS:
            raise UserError(
                f"no command {command}{_nearest(command, [*COMMANDS, 'cache', 'check'])}; see dpo --help"
            )
        config = parse(command, rest)
        run_dir = None if checking else Path(config.run_dir)
        _execute(command, config, checking=checking)
    except UserError as error:
        _say(f"dpo: error: {error}")
        return _finish(run_dir, command, 2, str(error), started)
    except StoppedBySignal as stopped:
        if os.environ.get("RANK", "0") == "0":  # all ranks stop together
            _say(f"dpo: stopped by a signal: {stopped}")
        return _finish(run_dir, command, 3, str(stopped), started)
    except RunFailed as failed:
        _say(f"dpo: failed: {failed}")
        return _finish(run_dir, command, 1, str(failed), started)
    except KeyboardInterrupt:
        _say("dpo: interrupted")
        return _finish(run_dir, command, 1, "interrupted", started)
    except Exception as error:
        _finish(run_dir, command, 1, f"{type(error).__name__}: {error}", started)
        raise
    return _finish(run_dir, command, 0, "done", started)


def _cache(arguments: Sequence[str]) -> int:
    """`dpo cache`: its own options here, all others are keys of the configuration."""
    if not arguments or any(word in ("-h", "--help") for word in arguments):
        print(CACHE_USAGE)
        return 0 if arguments else 2
    action, *rest = arguments
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.set_defaults(recompute=0, and_config=[], dry_run=False)
    if action == "verify":
        parser.add_argument("--recompute", type=int)
    if action == "prune":
        parser.add_argument("--and_config", action="append")
        parser.add_argument("--dry_run", action="store_true")
    try:
        if action not in ("info", "verify", "prune"):
            raise UserError(f"no action {action}; expected info, verify or prune: see dpo cache --help")
        folder = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
        options, keys = parser.parse_known_args(rest)
        needless = [*keys, *(["--and_config"] if options.and_config else [])]
        if folder is None and not keys:
            raise UserError("expected a folder or --config FILE: see dpo cache --help")
        if folder is not None and needless:
            raise UserError(
                f"{needless[0]}: dpo cache {action} FOLDER does not take it: see dpo cache --help"
            )
        if options.recompute < 0:
            raise UserError(f"--recompute: {options.recompute}; expected a number of rows, at least 0")
        others = [cast(Config, parse("precompute-ref", ["--config", name])) for name in options.and_config]
        target = folder or cast(Config, parse("precompute-ref", keys))
        from dpo import cache

        if action == "info":
            cache.show_info(target)
        elif action == "verify":
            cache.verify_caches(target, recompute=options.recompute)
        else:
            cache.prune_caches(target, others, dry_run=options.dry_run)
    except (UserError, argparse.ArgumentError) as error:
        _say(f"dpo: error: {error}")
        return 2
    return 0


def parse(command: str, arguments: Sequence[str]) -> Config | SftConfig:
    """The configuration of a command from its arguments.

    Raises:
        UserError: Everything that is wrong, one problem a line.
        SystemExit: With status 0, after --help or --print_config.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    kind: type[Config] | type[SftConfig] = SftConfig if command == "sft" else Config
    parser = ArgumentParser(prog=f"dpo {command}", description=COMMANDS[command], exit_on_error=False)
    parser.add_argument("--config", action="config", help="YAML file with any of the keys below")
    parser.add_class_arguments(kind)
    if any(word in ("-h", "--help") for word in arguments):
        parser.print_help()
        raise SystemExit(0)
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
    noun = "problem" if len(found) == 1 else "problems"
    listed = "".join(f"\n  {problem}" for problem in found)
    raise UserError(f"{len(found)} {noun} in the configuration:{listed}")


def _built(parser: ArgumentParser, namespace: Namespace) -> dict[str, Any]:
    return dict(vars(parser.instantiate(namespace)))


def _problems_of_keys(kind: type, arguments: Sequence[str]) -> Iterator[str]:
    """Unreadable files and unknown keys, in files and among the arguments."""
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
            yield f"{place}{key}: unknown key{_nearest(key, set(leaves))}"


def _problems_of_items(place: str, value: Any, expected: Any) -> Iterator[str]:
    """Unknown keys of the items of a list, such as the {path, weight} of a mixture."""
    parts = [inner for part in get_args(expected) for inner in (part, *get_args(part))]
    names = {field.name for part in parts if is_dataclass(part) for field in fields(part)}
    for index, item in enumerate(value if isinstance(value, list) and names else []):
        for name in item if isinstance(item, dict) else []:
            if name not in names:
                yield f"{place}[{index}].{name}: unknown key{_nearest(str(name), names)}"


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
        if key not in leaves:
            continue
        parser = ArgumentParser(exit_on_error=False)
        parser.add_argument("--value", type=leaves[key].type)
        try:
            parser.parse_object({"value": value}) if place else parser.parse_args([f"--value={value}"])
        except (ArgumentError, TypeError, ValueError) as error:
            yield f"{place}{key}: {value!r}: {_short(str(error))}"
    for key, leaf in leaves.items():
        branch_given = any(name.startswith(leaf.needed_with) for name in given)
        if leaf.required and key not in given and branch_given | (leaf.needed_with == ""):
            yield f"{key}: required"


def _given(kind: type, arguments: Sequence[str]) -> Iterator[tuple[str, str, Any]]:
    """(place, dotted key, value) of everything the user gave: config files flattened, then arguments."""
    words = iter(arguments)
    legal = set(_leaves(kind))
    for word in words:
        if not word.startswith("--"):
            continue
        key, separator, value = word[2:].partition("=")
        if key in ("help", "print_config"):
            continue
        value = value if separator else next(words, "")
        if key == "config":
            yield from ((f"{value}: ", *entry) for entry in _flat(_read_yaml(value), "", legal))
        else:
            yield "", key, value


def _read_yaml(name: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(Path(name).read_text())
    except OSError as error:
        raise UserError(f"--config: {name}: {error.strerror}; expected a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config: {name}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"--config: {name}: expected keys and values, got {type(tree).__name__}")
    return tree


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
    hints = get_type_hints(kind)
    for field in fields(kind):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        nested = [part for part in (hint, *get_args(hint)) if is_dataclass(part)]
        if nested:
            branch = optional_branch if nested[0] is hint else f"{key}."
            found |= _leaves(nested[0], f"{key}.", branch)  # type: ignore[arg-type]
        else:
            found[key] = _Leaf(hint, field.default is field.default_factory, optional_branch)
    return found


def _nearest(key: str, legal: Sequence[str] | set[str]) -> str:
    close = difflib.get_close_matches(key, sorted(legal), n=1, cutoff=0.5) or [
        known for known in sorted(legal) if known.rpartition(".")[2] == key.rpartition(".")[2]
    ]
    return f"; did you mean {close[0]}?" if close else ""


def _short(message: str) -> str:
    """Jsonargparse's explanation without its preamble and Python's way of naming types."""
    lines = [
        line.strip() for line in message.splitlines() if line.strip() and not line.startswith("Parser key")
    ]
    return re.sub(r"<class '(\w+)'>", r"\1", "; ".join(lines[:2])).replace("typing.", "") or message


def _execute(command: str, config: Config | SftConfig, *, checking: bool) -> None:
    from dpo import commands

    if checking:
        commands.check(command, config)
    elif isinstance(config, SftConfig):
        commands.sft(config)
    else:
        {"precompute-ref": commands.precompute_ref, "train": commands.train, "evaluate": commands.evaluate}[
            command
        ](config)


def _finish(run_dir: Path | None, command: str, status: int, message: str, started: float) -> int:
    """Leaves RUN_DIR/exit.json for scripts, from rank 0."""
    if run_dir is not None and os.environ.get("RANK", "0") == "0":
        record_end(run_dir, command, status, message, started)
    return status


def _say(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr, flush=True)
