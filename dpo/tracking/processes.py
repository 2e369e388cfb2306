"""Which process is meant, also after its number has been given to another one, and whether it lives."""

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

    def lives(self) -> bool | None:
        """Whether it is there; None where that cannot be known from here."""
        if not self.place or self.place != _place():
            return None
        return bool(self.began) and _began(self.pid) == self.began


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
