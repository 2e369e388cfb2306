"""The options of `dpo convert`."""

import argparse
from pathlib import Path

from dpo.errors import UserError

USAGE = """usage: dpo convert FILE [--num_gpus 1] [--output NEW]

Turns FILE, a YAML configuration of TRL's DPO trainer or of the alignment-handbook, into one of ours, and says
of every key what it became. What FILE leaves out takes TRL's default where ours differs.

--num_gpus  on how many GPUs that run was: its batch size counts on each; default: 1
--output    the new file; default: FILE's name with _dpo behind it, in this folder
"""


def run_convert(arguments: list[str]) -> int:
    """`dpo convert`."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--num_gpus", type=int, default=1)
    parser.add_argument("--output")
    options, rest = parser.parse_known_args(arguments)
    if len(rest) != 1 or rest[0].startswith("-"):
        raise UserError(f"expected one file, got {' '.join(rest) or 'none'}: see dpo convert --help")
    if options.num_gpus < 1:
        raise UserError(f"--num_gpus: {options.num_gpus}; expected at least 1: see dpo convert --help")
    source = Path(rest[0])
    from dpo.commands.convert import convert_file

    convert_file(source, options.num_gpus, Path(options.output or f"{source.stem}_dpo.yaml"))
    return 0
