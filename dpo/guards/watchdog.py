"""Names a rank that died, and ends a run that got stuck with the stacks of all ranks.

Every rank writes a heartbeat into the process group's store once a second, from a thread of its own, with how
far it has come. A rank whose collective fails reads there which rank is gone. A rank without progress
for too long writes the stacks of its threads and exits, which makes the launcher end the others.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from socket import gethostname
from types import TracebackType
from typing import Any

import torch.distributed as dist

from dpo import distributed
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.tracking.exit_record import record_end
from dpo.tracking.run_folder import RunFolder

HEARTBEAT_SECONDS = 1.0
GONE_AFTER_SECONDS = 3.0
"""A rank whose heartbeats stop for this long, while another rank looks for it, is gone."""
PREFIX = "dpo/alive"
KINDS: dict[str, type[UserError | StoppedBySignal | RunFailed]] = {
    kind.__name__: kind for kind in (UserError, StoppedBySignal, RunFailed)
}


@dataclass(slots=True, kw_only=True)
class Heartbeat:
    """What a rank publishes about itself."""

    host: str
    pid: int
    beats: int = 0
    """Seconds since its first heartbeat, roughly."""
    progress: int = 0
    """Micro-batches, evaluation batches and files so far; ranks that work together have the same."""
    doing: str = "starting"


class Watchdog:
    """This rank's heartbeats, and what those of the other ranks say."""

    def __init__(self, folder: RunFolder, command: str, stuck_after_seconds: float) -> None:
        """Nothing happens before it is entered, and nothing counts as stuck before the first `progress`.

        Args:
            folder: Where stacks and exit.json go.
            command: For exit.json.
            stuck_after_seconds: Longest time between two calls of `progress`.
        """
        self._folder, self._command = folder, command
        self._stuck_after, self._started = stuck_after_seconds, time.time()
        self._mine = Heartbeat(host=gethostname(), pid=os.getpid())
        self._progressed: float | None = None
        self._ended = threading.Event()
        self._store: Any = None
        self._store_is_gone = False
        self._first_end: dict[str, Any] | None = None
        if distributed.is_distributed():
            shared_store: Any = dist.distributed_c10d._get_default_store()
            own_connection = shared_store.clone()
            self._store = dist.distributed_c10d.PrefixStore(PREFIX, own_connection)

    def progress(self, doing: str) -> None:
        """Notes that this rank advances; cheap enough for every micro-batch.

        Args:
            doing: What comes now, such as `step 7`.
        """
        self._mine.doing = doing
        self._mine.progress += 1
        self._progressed = time.monotonic()

    def explain(self, error: Exception) -> Exception:
        """The reason for an error of this rank: a rank that is gone, one that failed first, or itself.

        Takes some seconds, in which the others see that this rank is alive.
        """
        if self._store is None:
            return error
        gone: dict[int, Heartbeat] = {}
        try:
            first = self._publish_end(error) == 1
            gone = self._gone()
            if gone:
                reason: Exception = RunFailed(f"{_listed(gone)} is gone: killed, or out of memory")
            elif first:
                return error
            else:
                reason = _reason(json.loads(self._store.get("end/1")), error)
        except dist.DistError:
            if self._first_end is not None:
                reason = _reason(self._first_end, error)
            else:
                gone = {0: Heartbeat(host=os.environ.get("MASTER_ADDR", "?"), pid=0)}
                reason = RunFailed(
                    "rank 0, which holds the store of the process group, is gone: killed, or out of memory"
                )
        if 0 in gone:
            self._report(gone, str(reason))
        return reason

    def publish_end(self, error: Exception) -> None:
        """Tells the other ranks why this one ends, so that they report the same reason."""
        if self._store is not None:
            try:
                self._publish_end(error)
            except dist.DistError:
                return  # the rank that holds the store has ended already

    def __enter__(self) -> "Watchdog":
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the thread."""
        self._ended.set()
        self._thread.join(timeout=2 * HEARTBEAT_SECONDS)

    def _watch(self) -> None:
        while not self._ended.is_set():
            if not self._store_is_gone:
                try:
                    self._beat()
                    self._read_first_end()
                except dist.DistError:
                    self._store_is_gone = True  # the main thread will find out which rank is gone
            idle = 0.0 if self._progressed is None else time.monotonic() - self._progressed
            if idle > self._stuck_after:
                self._end_stuck_run(idle)
            self._ended.wait(HEARTBEAT_SECONDS)

    def _beat(self) -> None:
        self._mine.beats += 1
        if self._store is not None:
            self._store.set(f"rank/{distributed.rank()}", json.dumps(asdict(self._mine)))

    def _read_first_end(self) -> None:
        """Keeps why the first rank has ended, for when the store is gone because that rank was rank 0."""
        if self._store is not None and self._first_end is None and self._store.check(["end/1"]):
            self._first_end = json.loads(self._store.get("end/1"))

    def _read(self) -> dict[int, Heartbeat]:
        if self._store is None:
            return {distributed.rank(): self._mine}
        names = {rank: f"rank/{rank}" for rank in range(distributed.world_size())}
        there = {rank: name for rank, name in names.items() if self._store.check([name])}
        return {rank: Heartbeat(**json.loads(self._store.get(name))) for rank, name in there.items()}

    def _gone(self) -> dict[int, Heartbeat]:
        """Ranks whose heartbeats have stopped and that have not published their end."""
        before, until = self._read(), time.monotonic() + GONE_AFTER_SECONDS
        while time.monotonic() < until:
            self._beat()  # this may be the thread that does so otherwise
            time.sleep(HEARTBEAT_SECONDS / 2)
        store = self._store
        return {
            rank: now
            for rank, now in self._read().items()
            if rank in before
            and rank != distributed.rank()
            and now.beats == before[rank].beats
            and not (store is not None and store.check([f"end/of/{rank}"]))
        }

    def _publish_end(self, error: Exception) -> int:
        """Publishes the reason; returns how many ranks, this one included, have published theirs."""
        assert self._store is not None
        rank = distributed.rank()
        message = str(error) if type(error).__name__ in KINDS else f"{type(error).__name__}: {error}"
        self._store.set(f"end/of/{rank}", "")
        number = int(self._store.add("ends", 1))
        self._store.set(
            f"end/{number}", json.dumps({"rank": rank, "kind": type(error).__name__, "message": message})
        )
        return number

    def _end_stuck_run(self, idle: float) -> None:
        try:
            self._explain_stuck_run(idle)
        finally:
            os._exit(1)

    def _explain_stuck_run(self, idle: float) -> None:
        stacks = self._folder.stacks / f"rank_{distributed.rank():05d}.txt"
        gone: dict[int, Heartbeat] = {}
        try:
            stacks.parent.mkdir(parents=True, exist_ok=True)
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
        try:
            gone, all_ranks = self._gone(), self._read()
            least = min(rank.progress for rank in all_ranks.values())
            behind = gone or {rank: beat for rank, beat in all_ranks.items() if beat.progress == least}
            culprits = f"behind: {_listed(behind)}"
        except dist.DistError as error:
            culprits = f"the rank that is behind cannot be determined ({error})"
        message = (
            f"no progress for {idle:.0f} s (train.stuck_after_seconds: {self._stuck_after:g}); "
            f"{culprits}. The stacks of all threads are in {stacks.parent}"
        )
        self._report(gone, message)
        print(f"dpo: [rank {distributed.rank()}] {message}", file=sys.stderr, flush=True)

    def _report(self, gone: dict[int, Heartbeat], message: str) -> None:
        """Writes exit.json from the first rank that is alive, unless it has been written since the start."""
        file = self._folder.exit_record
        written = file.is_file() and file.stat().st_mtime >= self._started
        alive = (rank for rank in range(distributed.world_size()) if rank not in gone)
        if distributed.rank() == min(alive) and not written:
            record_end(self._folder, self._command, 1, message, self._started)


def _reason(first_end: dict[str, Any], own: Exception) -> Exception:
    """What another rank has published, as this rank's error; `own` where both were stopped by a signal."""
    kind = KINDS.get(first_end["kind"], RunFailed)
    if kind is StoppedBySignal and isinstance(own, StoppedBySignal):
        return own
    return kind(f"rank {first_end['rank']}: {first_end['message']}")


def _listed(ranks: dict[int, Heartbeat]) -> str:
    return ", ".join(
        f"rank {rank} ({beat.host}, process {beat.pid}, last seen: {beat.doing})"
        for rank, beat in ranks.items()
    )
