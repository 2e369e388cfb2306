"""Which process is meant, also after its number has been given to another one, and whether it lives."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from socket import gethostname


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
