"""How a command ended, for scripts: RUN_DIR/exit.json. Imports no torch: the command line stays quick."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from dpo.errors import UserError
from dpo.files import write_file
from dpo.tracking.history import last_step
from dpo.tracking.run_folder import RunFolder

COUNTERS = ("attempt", "gained", "attempts_without_a_step")


def record_end(
    folder: RunFolder, command: str, status: int, message: str, started: float, *, in_use: bool = False
) -> None:
    """Writes exit.json: command, status, message, last step, start, and what this attempt gained.

    `attempt` counts the starts of the run's training, `gained` the optimizer steps since the one before, and
    `attempts_without_a_step` how many in a row gained none: launch/slurm.sbatch gives up by it.

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
    record: dict[str, Any] = {
        "command": command,
        "status": status,
        "message": message,
        "step": 0,
        "started": started,
        **_counted(_previous(folder), folder, trains=command in ("train", "sft")),
    }
    try:
        if in_use:
            raise OSError("it belongs to another process")
        folder.path.mkdir(parents=True, exist_ok=True)
        write_file(folder.exit_record, json.dumps(record, indent=2) + "\n")
    except OSError:  # has been reported already
        with contextlib.suppress(OSError, KeyError):
            Path(os.environ["EXIT_RECORD"]).write_text(json.dumps(record))


def _counted(previous: dict[str, Any], folder: RunFolder, *, trains: bool) -> dict[str, int]:
    """The counters of this record; other commands than training carry them on."""
    then = {name: previous.get(name) for name in ("trained", *COUNTERS)}
    before = {name: value if isinstance(value, int) else 0 for name, value in then.items()}
    if not trains:
        return before
    step = 0
    with contextlib.suppress(UserError, OSError, ValueError, KeyError, TypeError):  # a damaged file
        step = last_step(folder)
    gained = max(0, step - before["trained"])
    return {
        "step": step,
        "trained": step,
        "attempt": before["attempt"] + 1,
        "gained": gained,
        "attempts_without_a_step": 0 if gained else before["attempts_without_a_step"] + 1,
    }


def _previous(folder: RunFolder) -> dict[str, Any]:
    for file in (folder.exit_record, folder.previous_exit_record):
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(file.read_text())
            if isinstance(found, dict):
                return found
    return {}
