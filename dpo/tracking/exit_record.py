"""How a command ended, for scripts: RUN_DIR/exit.json. Imports no torch: the command line stays quick."""

import contextlib
import json
import os
from pathlib import Path


def record_end(run_dir: Path, command: str, status: int, message: str, started: float) -> None:
    """Writes exit.json (command, status, message, last step, start).

    Only into a folder that is a run of ours, or not there yet. On a full disk it goes to the file that
    EXIT_RECORD names, if that is another disk's: launch/run reads it there.

    Args:
        run_dir: The run folder.
        command: Such as `train`.
        status: What the process exits with.
        message: One reason, for people.
        started: When the command began, in seconds since 1970.
    """
    if not _is_ours(run_dir):
        return
    step = _last_step(run_dir) if command in ("train", "sft") else 0
    record = {"command": command, "status": status, "message": message, "step": step, "started": started}
    writing = run_dir / f".exit.json.{os.getpid()}"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        writing.write_text(json.dumps(record, indent=2) + "\n")
        writing.rename(run_dir / "exit.json")
    except OSError:  # a full disk or a folder without permission has been reported already
        with contextlib.suppress(OSError):
            writing.unlink(missing_ok=True)
        with contextlib.suppress(OSError, KeyError):
            Path(os.environ["EXIT_RECORD"]).write_text(json.dumps(record))


def _is_ours(run_dir: Path) -> bool:
    if not run_dir.exists():
        return True
    names = ("exit.json", "config.yaml")
    return run_dir.is_dir() and (
        not any(run_dir.iterdir()) or any((run_dir / name).is_file() for name in names)
    )


def _last_step(run_dir: Path) -> int:
    try:
        return int(json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return 0
