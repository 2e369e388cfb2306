"""Between launch/run and the launcher: starts it, ends it with launch/run, and waits for what it leaves.

    supervise.py PARENT COMMAND ...

A launcher that dies, or that a second signal ends, leaves ranks that are still saving: they become children
of this process (on Linux), which exits after the last of them. Uses the standard library alone.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
LONGEST_WAIT = float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600"))


def main(parent: int, command: list[str]) -> int:
    """Runs the command; returns its exit status, 128 + N for signal N."""
    kernel = ctypes.CDLL(None) if sys.platform == "linux" else None

    def end_with_parent() -> None:
        if kernel is not None:
            kernel.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    end_with_parent()
    if kernel is not None:
        kernel.prctl(PR_SET_CHILD_SUBREAPER, 1)
    if os.getppid() != parent:  # it died before we asked the kernel
        return 1
    environment = {**os.environ, "DPO_SUPERVISOR": str(os.getpid())}
    child = subprocess.Popen(command, env=environment, preexec_fn=end_with_parent)

    def pass_on(number: int, _: FrameType | None) -> None:
        wanted = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
        for pid in [child.pid] if child.returncode is None else children():
            os.kill(pid, wanted)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, pass_on)
    status = child.wait()
    if status != 0:
        wait_for_others()
    return status if status >= 0 else 128 - status


def wait_for_others() -> None:
    """Waits for the ranks of a launcher that ended before them."""
    until = time.monotonic() + LONGEST_WAIT
    while time.monotonic() < until:
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended:
            time.sleep(0.1)


def children() -> list[int]:
    """Process numbers of the children of this process."""
    lists = Path("/proc/self/task").glob("*/children")
    return [int(pid) for file in lists for pid in file.read_text().split()]


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
