"""How a launched process starts: it ends with its launcher, and does not wait for what killed ones left.

Imports nothing that takes time: `python -m dpo` calls it before anything else.
"""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from dpo import terminal

LAUNCHED = "TORCHELASTIC_RUN_ID"
"""Is set where torchelastic has started this process."""
SUPERVISOR = "DPO_SUPERVISOR"
"""Process number of launch/supervise.py, which inherits the ranks of a launcher that has died."""
PR_SET_PDEATHSIG = 1
LONGEST_BUILD_SECONDS = 300.0


def end_with_launcher() -> None:
    """Asks the kernel for a SIGTERM when the launcher dies, so that no rank is left behind (Linux only).

    Exits where it has died already: such a rank would wait for a store that nobody opens, or join that of the
    next run on the same port.
    """
    if sys.platform == "linux" and LAUNCHED in os.environ:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if Path("/proc/self/exe").exists() and not _has_launcher(os.getppid()):
            print("dpo: failed: the launcher has ended; start it again", file=sys.stderr, flush=True)
            os._exit(1)


def _has_launcher(parent: int) -> bool:
    """Whether the launcher, which runs in the same interpreter, is an ancestor; others may stand between.

    A rank that `launch/supervise.py` has inherited has none, although that is run by the interpreter too.
    """
    while parent > 0 and str(parent) != os.environ.get(SUPERVISOR):
        if _same_program(parent):
            return True
        parent = _parent_of(parent)
    return False


def _same_program(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/exe").readlink() == Path("/proc/self/exe").readlink()
    except OSError:  # of another user, or gone
        return False


def _parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def remove_abandoned_build_locks() -> None:
    """Removes locks of DeepSpeed's extensions whose builder was killed: all later starts would wait for it.

    A builder keeps its lock open. One on another machine, with a shared home, is given a few minutes.
    """
    from torch.utils.cpp_extension import get_default_build_root  # only where DeepSpeed is used: it is slow

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in (*root.glob("*/lock"), *root.glob("*/*/lock")):
        waited = False
        while (age := _age(lock)) is not None and not _is_open(lock):
            if age > LONGEST_BUILD_SECONDS:
                lock.unlink(missing_ok=True)
                terminal.warning(
                    f"{lock} is removed: the process that built DeepSpeed's extension was killed"
                )
            elif not waited:
                waited = True
                terminal.note(
                    f"{lock}: another machine builds DeepSpeed's extension, or a build was killed; waiting "
                    f"{LONGEST_BUILD_SECONDS - age:.0f} s (delete the file if nothing is being built)"
                )
            time.sleep(0.5)


def _age(file: Path) -> float | None:
    """Seconds since a file was written; None if it is gone."""
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return None


def _is_open(file: Path) -> bool:
    """Whether a process of this machine has the file open."""
    wanted = file.resolve()
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if descriptor.readlink() == wanted:
                return True
    return False
