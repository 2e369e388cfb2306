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
        if _is_orphan(os.getppid()):
            os._exit(1)


def _is_orphan(parent: int) -> bool:
    """Whether the parent is not the launcher, which runs in the same interpreter as its ranks."""
    if str(parent) == os.environ.get(SUPERVISOR):
        return True
    try:
        return Path(f"/proc/{parent}/exe").readlink() != Path("/proc/self/exe").readlink()
    except PermissionError:  # of another user
        return True
    except OSError:
        return False
