"""Preference data in the common formats -> preference files; from JSON Lines, Parquet, folders or the hub.

Training reads these formats too. Preparing them gives a held-out split, counts of faulty rows, and checksums.
"""

import argparse
from functools import partial

from data_prep.files import PreferenceWriter, describe_arguments
from data_prep.relabel import LABELS, relabel
from data_prep.splits import open_inputs, prompt_key, read_inputs
from dpo.config import FIELDS
from dpo.data.pairing import PAIRING_RULES
from dpo.data.rows import group_from_row
from dpo.errors import UserError

SUMMARY = (
    "Any preference data: rows of prompt, chosen, rejected, or of prompt, completions and pairs, scores or "
    "labels."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this source."""
    parser.add_argument(
        "input",
        nargs="+",
        metavar="INPUT",
        help="files, folders, patterns, URLs or hub names as in data.train (docs/data.md), with options too: "
        "'{path: ORG/DATA, split: train_prefs}'",
    )
    parser.add_argument(
        "--test",
        nargs="+",
        default=[],
        metavar="INPUT",
        help="held-out data (default: the input's test split, else a share of the input)",
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="FIELD=COLUMN",
        help=f"columns with other names, such as prompt=question; fields are {', '.join(FIELDS)}",
    )
    parser.add_argument(
        "--pairing", choices=PAIRING_RULES, default="best-vs-rest", help="how scores become pairs"
    )
    parser.add_argument(
        "--min_margin", type=float, default=0.0, help="scores that differ by no more than this make no pair"
    )
    parser.add_argument(
        "--completions",
        choices=("complete", "fragments"),
        help="whether completions end where their author ended, or were cut off (default: as in the input's "
        "manifest, else complete)",
    )
    parser.add_argument(
        "--labels",
        choices=LABELS,
        default="given",
        help="for control experiments: flipped exchanges chosen and rejected in each training pair, shuffled "
        "permutes the ranks of each training prompt's completions; held-out pairs do not change (default: "
        "given)",
    )


def run(args: argparse.Namespace) -> None:
    """Writes the preference files. Raises UserError."""
    columns = _columns(args.columns)
    inputs = open_inputs(args.input, args.test)
    known = {source.completions_are_complete for source in (*inputs.train, *inputs.test)} - {None}
    if args.completions is None and len(known) > 1:
        raise UserError(
            "the inputs' manifests differ in completions_are_complete; give --completions, or prepare each "
            "input by itself"
        )
    complete = args.completions == "complete" if args.completions else known != {False}
    with PreferenceWriter(
        args.output,
        overwrite=args.overwrite,
        completions_are_complete=complete,
        source=describe_arguments(args),
    ) as writer:
        writer.sources.extend(inputs.describe())
        convert = partial(
            group_from_row,
            columns=columns,
            pairing=args.pairing,
            min_margin=args.min_margin,
            notes=writer.notes,
        )
        groups = read_inputs(inputs, convert, prompt_key, args=args, notes=writer.notes)
        writer.write_all(
            (split, relabel(group, args.labels, args.seed) if split == "train" else group)
            for split, group in groups
        )


def _columns(mappings: list[str]) -> dict[str, str]:
    columns = {}
    for mapping in mappings:
        field, equals, column = mapping.partition("=")
        if field not in FIELDS or not equals or not column:
            raise UserError(
                f"--columns: {mapping!r}; expected FIELD=COLUMN with a field of {', '.join(FIELDS)}"
            )
        columns[field] = column
    return columns
