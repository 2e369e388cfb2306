"""`python -m data_prep SOURCE --output DIR`: runs one source and prints what was written and dropped.

Every source is a module of this package with `SUMMARY`, `add_arguments(parser)` and `run(args)`; `run` writes
the folder `args.output` through `data_prep.files.PreferenceWriter`. A new source needs a module and a line in
SOURCES. Only the chosen one is imported, so that `--help` is fast.
"""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data_prep.splits import part_of
from dpo.errors import UserError
from dpo.interrupts import keyboard


class Source(NamedTuple):
    """One line of the table of sources."""

    help: str
    """Its line in `--help`."""
    has_input: bool = True
    """Whether it reads rows, and so has options for faulty rows, their number and the split."""


SOURCES = {
    "hh": Source("Anthropic's HH-RLHF dialogues, from files or the hub"),
    "labels": Source("OpenAI's lm-human-preferences labels: the best of 4 continuations"),
    "sample": Source("continuations of prompts, sampled from a model and scored"),
    "preferences": Source("JSON Lines, Parquet or hub data in any common preference format"),
    "stories": Source("the demo's data: generated stories that end happy, neutral or sad", has_input=False),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one source. Returns the exit status: 0 done, 1 interrupted, 2 bad usage or data."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = _parser(chosen=arguments[0] if arguments else None)
    args = parser.parse_args(arguments)
    try:
        with keyboard():
            importlib.import_module(f"data_prep.{args.source}").run(args)
        if os.environ.get("RANK", "0") == "0":  # `sample` may run on several ranks; rank 0 writes
            print(_summary(args.output))
    except UserError as error:
        print(f"data_prep: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("data_prep: interrupted; nothing was written", file=sys.stderr)
        return 1
    return 0


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser of all sources; only the chosen one has its options, since only its module is imported."""
    parser = argparse.ArgumentParser(
        prog="data_prep", description="Turns a source into preference files: Parquet and a manifest."
    )
    commands = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    for name, source in SOURCES.items():
        command = commands.add_parser(name, help=source.help, allow_abbrev=False)
        if name == chosen:
            module = importlib.import_module(f"data_prep.{name}")
            command.description = module.SUMMARY
            module.add_arguments(command)
            _add_common_arguments(command, has_input=source.has_input)
    return parser


def _add_common_arguments(parser: argparse.ArgumentParser, *, has_input: bool) -> None:
    common = parser.add_argument_group("options of every source" if has_input else "options of output")
    common.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder to write")
    common.add_argument("--overwrite", action="store_true", help="replace preference files in DIR")
    common.add_argument("--seed", type=int, default=0, help="seed of every random choice (default: 0)")
    if has_input:
        common.add_argument(
            "--strict", action="store_true", help="make a faulty row an error instead of a counted drop"
        )
        common.add_argument(
            "--max_rows", type=_positive, metavar="N", help="read at most N rows of each input split"
        )
        split = common.add_mutually_exclusive_group()
        split.add_argument(
            "--test_fraction",
            type=_fraction,
            default=0.1,
            metavar="F",
            help="share of the prompts that is held out if the input has no test split (default: 0.1)",
        )
        split.add_argument(
            "--fold",
            type=part_of,
            metavar="K/N",
            help="hold out the K-th of N equal parts of the prompts instead; 1/5 to 5/5 hold out each once",
        )


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected at least 1")
    return value


def _fraction(text: str) -> float:
    if not 0 <= (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text}; expected at least 0 and less than 1")
    return value


def _summary(output: Path) -> str:
    manifest = json.loads((output / "manifest.json").read_text(encoding="utf-8"))
    rows, dropped = manifest["rows"], manifest["dropped"]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in dropped.items())
    return (
        f"wrote {output}: {rows['train']:,} train and {rows['test']:,} test groups, "
        f"{manifest['pairs']:,} pairs\n"
        f"dropped: {reasons or 'nothing'}"
    )
