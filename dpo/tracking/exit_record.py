"""How a command ended, for scripts: RUN_DIR/exit.json. Imports no torch: the command line stays quick."""

import contextlib
import json
import os
from pathlib import Path

from dpo.files import write_file
from dpo.tracking.history import last_step
from dpo.tracking.run_folder import RunFolder


def record_end(
    folder: RunFolder, command: str, status: int, message: str, started: float, *, in_use: bool = False
) -> None:
    """Writes exit.json (command, status, message, last step, start).

    Only into a folder that is a run of ours, or does not exist yet. If that fails, such as on a full disk,
    or the folder is in use, the record goes to the file that EXIT_RECORD names: launch/run reads it there.

    Args:
        folder: The run folder.
        command: Such as `train`.
        status: The process's exit status.
        message: One reason, for people.
        started: When the command began, in seconds since 1970.
        in_use: The folder belongs to another process, whose record it will hold.
    """
    if not folder.may_be_written:
        return
    step = 0
    if command in ("train", "sft"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a damaged file
            step = last_step(folder)
    record = {"command": command, "status": status, "message": message, "step": step, "started": started}
    try:
        if in_use:
            raise OSError("it belongs to another process")
        folder.path.mkdir(parents=True, exist_ok=True)
        write_file(folder.exit_record, json.dumps(record, indent=2) + "\n")
    except OSError:  # has been reported already
        with contextlib.suppress(OSError, KeyError):
            Path(os.environ["EXIT_RECORD"]).write_text(json.dumps(record))
