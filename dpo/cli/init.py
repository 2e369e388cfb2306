"""The options of `dpo init`."""

from pathlib import Path

from dpo.errors import UserError

USAGE = """usage: dpo init FOLDER

Copies configs/ and launch/ into FOLDER (. for the current one): ready-made experiments, DeepSpeed settings,
accelerate configurations and the launch scripts. Nothing that is there is overwritten.
"""


def run_init(arguments: list[str]) -> int:
    """`dpo init`."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise UserError(f"expected one folder, got {' '.join(arguments)}: see dpo init --help")
    from dpo.commands.init import init

    init(Path(arguments[0]))
    return 0
