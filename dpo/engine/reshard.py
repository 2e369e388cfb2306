"""Resuming with another number of ranks, through DeepSpeed's universal checkpoints."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpo import distributed
from dpo.engine.sharded_state import ENGINE_TAG
from dpo.errors import UserError
from dpo.files import UNIVERSAL

WHOLE = ("one device", "DDP")
"""Engines whose state rank 0 writes whole."""
CONVERTER = "deepspeed.checkpoint.ds_to_universal"


def needs_universal_form(checkpoint: Path, written_with: str, num_ranks: int, kind: str) -> bool:
    """Whether the state must be converted for this number of ranks.

    Args:
        checkpoint: For the message.
        written_with: The engine that wrote it, from its manifest.
        num_ranks: How many ranks wrote it.
        kind: This run's engine, such as `DeepSpeed ZeRO-2`.

    Raises:
        UserError: Another engine wrote it, and its state cannot be converted.
    """
    if written_with == kind:
        sharded = re.match(r"DeepSpeed ZeRO-[123]", kind) is not None
        return sharded and num_ranks != distributed.world_size()
    if {written_with, kind} <= set(WHOLE):
        return False
    raise UserError(
        f"{checkpoint}: written with {written_with}, and this run uses {kind}, which cannot read it: start "
        "it with the same engine (the number of ranks may differ), or train again in another run_dir"
    )


@contextmanager
def universal_form(checkpoint: Path, run_dir: Path) -> Iterator[Path]:
    """A folder that an engine of any world size can load, removed afterwards. All ranks must enter.

    Raises:
        UserError: The converter failed.
    """
    folder = run_dir / "checkpoints" / f".{checkpoint.name.lstrip('.')}{UNIVERSAL}"
    distributed.on_main(lambda: _convert(checkpoint / ENGINE_TAG, folder))
    try:
        yield folder
        distributed.barrier()
    finally:
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)


def _convert(state: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    # absolute: the converter writes a file into the parent of its output and splits the name to find it
    places = [
        "--input_folder",
        str(state.absolute()),
        "--output_folder",
        str((folder / ENGINE_TAG).absolute()),
    ]
    alone = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    converted = subprocess.run(
        [sys.executable, "-m", CONVERTER, *places, "--inject_missing_state"],
        env=alone,
        capture_output=True,
        text=True,
        check=False,
    )
    if converted.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        reason = (converted.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"{state.parent}: DeepSpeed could not convert it for {distributed.world_size()} rank(s) "
            f"({reason}); start it with as many ranks as wrote it"
        )
