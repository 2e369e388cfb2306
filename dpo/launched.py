"""What a process owes the launcher that started it: to end with it, from its first instructions on.

Imports nothing that takes time: `python -m dpo` calls it before anything else.
"""

import ctypes
import os
import signal
import sys
from pathlib import Path

LAUNCHED = "TORCHELASTIC_RUN_ID"
"""Is set where torchelastic has started this process."""
SUPERVISOR = "DPO_SUPERVISOR"
"""Process number of launch/supervise.py, which inherits the ranks of a launcher that has died."""
PR_SET_PDEATHSIG = 1


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
