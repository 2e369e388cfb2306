"""How a process begins and which one is meant.

A launched process ends with its launcher and does not wait for what killed ones left. A process is known by
more than its number, which may have been given to another one. Imports nothing that takes time: `python -m
dpo` calls it before anything else.
"""

import ctypes
import gc
import hashlib
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname

from dpo import alive, terminal

LAUNCHED = "TORCHELASTIC_RUN_ID"
"""Is set where torchelastic has started this process."""
SUPERVISOR = "DPO_SUPERVISOR"
"""Process number of launch/supervise.py, which inherits the ranks of a launcher that has died."""
PR_SET_PDEATHSIG = 1
LONGEST_BUILD_SECONDS = 300.0


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process of one machine."""

    host: str
    pid: int
    place: str
    """Boot and process namespace in which `pid` means something; empty where they are not known."""
    began: str
    """When the process began, as the kernel counts, since numbers are used again."""

    def tag(self) -> str:
        """Short enough for the name of a file: place, number and beginning."""
        place = hashlib.sha256(self.place.encode()).hexdigest()[:8] if self.place else "unknown"
        return f"{place}-{self.pid}-{self.began or 0}"

    def lives(self) -> bool | None:
        """Whether it is there; None where that cannot be known from here."""
        if not self.place or self.place != _place():
            return None
        return bool(self.began) and _began(self.pid) == self.began


def tagged_lives(tag: str) -> bool | None:
    """Whether the process with a `tag` is there; None where that cannot be known from here.

    Args:
        tag: Anything; only tags of this machine's processes are understood.
    """
    own, parts = this_process(), tag.split("-")
    here = bool(own.place) and parts[0] == own.tag().partition("-")[0]
    if not here or len(parts) != 3 or not parts[1].isdecimal():
        return None
    return _began(int(parts[1])) == parts[2]


def this_process() -> Process:
    """The process that asks."""
    pid = os.getpid()
    return Process(host=gethostname(), pid=pid, place=_place(), began=_began(pid))


def _place() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _began(pid: int) -> str:
    """When a process began; empty for one that has ended."""
    try:
        parts = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if parts[0] in "ZX" else parts[19]


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
            alive.advanced()


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


def put_off_collections() -> None:
    """Switches garbage collection off until `collect_from_here`: what a command imports stays.

    Collections that look at torch's and transformers' objects again and again take a seventh of the time that
    importing them takes.
    """
    gc.disable()


def collect_from_here() -> None:
    """Switches garbage collection on where it was put off: from now on, without what was imported."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
