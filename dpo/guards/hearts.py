"""What the ranks tell each other through the process group's store: that they live, and why they end.

Every rank writes a heartbeat once a second. To look at all of them costs a request per rank, so each rank
watches only the next one, and the next one of its own machine, whose process it can look up.
"""

import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from dpo import alive, distributed
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.processes import Process, this_process

HEARTBEAT_SECONDS = 1.0
GONE_AFTER_SECONDS = 3.0
"""A rank whose heartbeats stop for this long, while another rank looks for it, is gone."""
SILENT_AFTER_SECONDS = 30.0
"""A rank of another machine whose heartbeats stop for this long is suspected; shorter, it may be busy."""
UNSEEN = Process(host="unknown machine", pid=0, place="", began="")
PREFIX = "dpo/alive"
KINDS: dict[str, type[UserError | StoppedBySignal | RunFailed]] = {
    kind.__name__: kind for kind in (UserError, StoppedBySignal, RunFailed)
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """What a rank publishes about itself."""

    process: Process
    beats: int
    """Seconds since its first heartbeat, roughly."""
    doing: str
    steps: int
    """See `dpo.alive.Life`."""
    idle: float
    """Seconds since its last sign of life."""
    waits: bool
    """Whether it waits for other ranks."""
    loads: bool
    """Whether it has not begun to work, so that others may wait for it unseen, in a library's collective."""

    def __str__(self) -> str:
        return f"{self.process.host}, process {self.process.pid}, last seen: {self.doing}"


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Why a rank has ended."""

    rank: int | None
    """None: of a rank that could not say it itself."""
    kind: str
    """Name of the exception."""
    message: str

    def as_error(self) -> Exception:
        """As an error of the rank that reads it."""
        said = self.message if self.rank is None else f"rank {self.rank}: {self.message}"
        return KINDS.get(self.kind, RunFailed)(said)


class Hearts:
    """The heartbeats and last words of all ranks. Every function may raise DistError: the store is gone.

    Two threads may use it: the store's connection takes one request at a time.
    """

    def __init__(self) -> None:
        """Publishes nothing yet; the process group must be up."""
        self._process, self._beats = this_process(), 0
        shared_store: Any = dist.distributed_c10d._get_default_store()
        self._store: Any = dist.distributed_c10d.PrefixStore(PREFIX, shared_store.clone())
        self._rank, self._world = distributed.rank(), distributed.world_size()
        local, of = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        on_machine = self._rank - local + (local + 1) % max(1, of)
        self._watched = {(self._rank + 1) % self._world, on_machine % self._world} - {self._rank}
        self._last: dict[int, tuple[int, float]] = {}
        """Rank -> the number of its last heartbeat, and when this rank first saw it."""

    def beat(self) -> None:
        """Publishes that this rank lives."""
        self._beats += 1
        self._store.set(f"rank/{self._rank}", json.dumps(asdict(own_heartbeat(self._beats, self._process))))

    def read(self, ranks: Iterable[int] | None = None) -> dict[int, Heartbeat]:
        """The last heartbeats of these ranks, or of all that have one."""
        names = {rank: f"rank/{rank}" for rank in (range(self._world) if ranks is None else ranks)}
        there = {rank: name for rank, name in names.items() if self._store.check([name])}
        return {rank: _heartbeat(self._store.get(name)) for rank, name in there.items()}

    def suspected(self) -> bool:
        """Whether a rank that this one watches has died without a word, or is silent on another machine."""
        for rank, beat in self.read(self._watched).items():
            silent = self._silence(rank, beat) > SILENT_AFTER_SECONDS
            lives = beat.process.lives()
            if (lives is False or (lives is None and silent)) and not self._has_ended(rank):
                return True
        return False

    def _silence(self, rank: int, beat: Heartbeat) -> float:
        """Seconds since this rank first saw the other's last heartbeat."""
        now = time.monotonic()
        if self._last.get(rank, (-1, now))[0] != beat.beats:
            self._last[rank] = (beat.beats, now)
        return now - self._last[rank][1]

    def forget(self) -> None:
        """This process was stopped for a while: the silence of others counts from now."""
        self._last.clear()

    def silent(self) -> dict[int, Heartbeat]:
        """Ranks without a heartbeat for some seconds that have not said why they end; takes these seconds.

        Their process may live: one that was stopped, or is busy in C code, is silent too. Returns as soon as
        a process is known to have died.
        """
        before, until = self.read(), time.monotonic() + GONE_AFTER_SECONDS
        while time.monotonic() < until:
            self.beat()  # this may be the thread that does so otherwise
            time.sleep(HEARTBEAT_SECONDS / 2)
            if dead := self._dead():
                return dead
        now = self.read()
        for rank in set(range(self._world)) - now.keys():  # it died before its first one
            before[rank] = now[rank] = Heartbeat(
                process=UNSEEN, beats=0, doing="joining", steps=0, idle=0.0, waits=False, loads=True
            )
        return {
            rank: beat
            for rank, beat in now.items()
            if rank in before
            and rank != self._rank
            and beat.beats == before[rank].beats
            and not self._has_ended(rank)
        }

    def others_get_on(self, seconds: float) -> bool:
        """Whether another rank for which this one may be waiting has given a sign of life in this time."""
        waits = alive.life.waits > 0
        others = (rank for rank in range(self._world) if rank != self._rank)
        return any(
            (waits or beat.loads)
            and not beat.waits
            and beat.idle <= seconds
            and self._silence(rank, beat) <= min(seconds, SILENT_AFTER_SECONDS)
            and beat.process.lives() is not False
            for rank in others
            for beat in self.read([rank]).values()
        )

    def publish_end(self, error: Exception, *, of: int | None) -> int:
        """Publishes why this rank ends; returns how many ends, with this one, have been published.

        Args:
            error: The reason.
            of: Whose reason it is; None: of a rank that could not say it.
        """
        kind = type(error).__name__
        message = str(error) if kind in KINDS else f"{kind}: {error}"
        self.leave()
        number = int(self._store.add("ends", 1))
        self._store.set(f"end/{number}", json.dumps(asdict(End(rank=of, kind=kind, message=message))))
        return number

    def leave(self) -> None:
        """Publishes that this rank has done its part: it is not gone when its process ends."""
        self._store.set(f"end/of/{self._rank}", "")

    def first_end(self) -> End | None:
        """Why the first rank has ended."""
        return End(**json.loads(self._store.get("end/1"))) if self._store.check(["end/1"]) else None

    def _dead(self) -> dict[int, Heartbeat]:
        return {
            rank: beat
            for rank, beat in self.read().items()
            if beat.process.lives() is False and not self._has_ended(rank)
        }

    def _has_ended(self, rank: int) -> bool:
        return bool(self._store.check([f"end/of/{rank}"]))


def own_heartbeat(beats: int = 0, process: Process | None = None) -> Heartbeat:
    """What this rank would publish now."""
    life = alive.life
    return Heartbeat(
        process=process or this_process(),
        beats=beats,
        doing=life.doing,
        steps=life.steps,
        idle=time.monotonic() - life.advanced_at,
        waits=life.waits > 0,
        loads=life.loading,
    )


def gone(silent: dict[int, Heartbeat]) -> dict[int, Heartbeat]:
    """Those of the silent ranks whose process is not known to live."""
    return {rank: beat for rank, beat in silent.items() if not beat.process.lives()}


def behind(ranks: dict[int, Heartbeat]) -> dict[int, Heartbeat]:
    """Whom others wait for: of those that do not wait, who has the fewest steps and is idle the longest."""
    own = {rank: beat for rank, beat in ranks.items() if not beat.waits} or ranks
    fewest = min(beat.steps for beat in own.values())
    late = {rank: beat for rank, beat in own.items() if beat.steps == fewest}
    longest = max(beat.idle for beat in late.values())
    return {rank: beat for rank, beat in late.items() if beat.idle > longest - 2 * HEARTBEAT_SECONDS}


def listed(ranks: dict[int, Heartbeat]) -> str:
    """Ranks for people."""
    return ", ".join(f"rank {rank} ({beat})" for rank, beat in ranks.items())


def _heartbeat(text: bytes) -> Heartbeat:
    found = json.loads(text)
    return Heartbeat(**{**found, "process": Process(**found["process"])})
