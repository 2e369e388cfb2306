"""A dead rank is named, and a rank that stands still ends the run with everybody's stacks.

Every rank writes a heartbeat into the process group's store once a second, from a thread of its own, with how
far it has come. A rank whose collective fails looks there for who is gone; a rank that has made no progress
for too long dumps the stacks of its threads and exits, which makes the launcher end the others.
"""

import faulthandler
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from socket import gethostname
from types import TracebackType
from typing import Any

import torch.distributed as dist

from dpo import distributed
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.tracking.exit_record import record_end

HEARTBEAT_SECONDS = 1.0
GONE_AFTER_SECONDS = 3.0
"""A rank whose heartbeat stands still for so long, while another has lost it, is gone."""
PREFIX = "dpo/alive"
KINDS: dict[str, type[UserError | StoppedBySignal | RunFailed]] = {
    kind.__name__: kind for kind in (UserError, StoppedBySignal, RunFailed)
}


@dataclass(slots=True, kw_only=True)
class Heartbeat:
    """What a rank says of itself."""

    host: str
    pid: int
    beats: int = 0
    """Seconds since its first heartbeat, roughly."""
    progress: int = 0
    """Micro-batches, evaluation batches and files so far; ranks that work together have the same."""
    doing: str = "starting"


class Watchdog:
    """Heartbeats of this rank, and what those of the others tell."""

    def __init__(self, run_dir: Path, command: str, stuck_after_seconds: float) -> None:
        """Nothing happens before `with`, and nothing counts as stuck before the first `progress`.

        Args:
            run_dir: Where stacks and exit.json go.
            command: For exit.json.
            stuck_after_seconds: Longest time between two calls of `progress`.
        """
        self._run_dir, self._command = run_dir, command
        self._stuck_after, self._started = stuck_after_seconds, time.time()
        self._mine = Heartbeat(host=gethostname(), pid=os.getpid())
        self._progressed: float | None = None
        self._ended = threading.Event()
        self._store: Any = None
        if distributed.is_distributed():
            meeting_place: Any = dist.distributed_c10d._get_default_store()
            own_connection = meeting_place.clone()
            self._store = dist.distributed_c10d.PrefixStore(PREFIX, own_connection)

    def progress(self, doing: str) -> None:
        """This rank goes on with something; cheap enough for every micro-batch.

        Args:
            doing: What comes now, such as `step 7`.
        """
        self._mine.doing = doing
        self._mine.progress += 1
        self._progressed = time.monotonic()

    def explain(self, error: Exception) -> Exception:
        """The reason behind an error of this rank: a rank that is gone, one that failed first, or itself.

        Takes some seconds, in which the others can tell that this rank is alive.
        """
        if self._store is None:
            return error
        try:
            first = self._say_farewell(error) == 1
            gone = self._gone()
            if gone:
                reason: Exception = RunFailed(f"{_listed(gone)} is gone: killed, or out of memory")
            elif first:
                return error
            else:
                said = json.loads(self._store.get("farewell/1"))
                kind = KINDS.get(said["kind"], RunFailed)
                reason = kind(f"rank {said['rank']}: {said['message']}")
        except dist.DistError:
            gone = {0: Heartbeat(host=os.environ.get("MASTER_ADDR", "?"), pid=0)}
            reason = RunFailed("rank 0, where the ranks meet, is gone: killed, or out of memory")
        if 0 in gone:
            self._report(gone, str(reason))
        return reason

    def farewell(self, error: Exception) -> None:
        """Tells the others why this rank ends, so that theirs is the same reason."""
        if self._store is not None:
            try:
                self._say_farewell(error)
            except dist.DistError:
                return  # whoever held the store has ended already

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
            try:
                self._publish()
            except dist.DistError:
                self._store = None  # the main thread will find out who is gone
            standing = 0.0 if self._progressed is None else time.monotonic() - self._progressed
            if standing > self._stuck_after:
                self._end_stuck_run(standing)
            self._ended.wait(HEARTBEAT_SECONDS)

    def _publish(self) -> None:
        self._mine.beats += 1
        if self._store is not None:
            self._store.set(f"rank/{distributed.rank()}", json.dumps(asdict(self._mine)))

    def _read(self) -> dict[int, Heartbeat]:
        if self._store is None:
            return {distributed.rank(): self._mine}
        names = {rank: f"rank/{rank}" for rank in range(distributed.world_size())}
        there = {rank: name for rank, name in names.items() if self._store.check([name])}
        return {rank: Heartbeat(**json.loads(self._store.get(name))) for rank, name in there.items()}

    def _gone(self) -> dict[int, Heartbeat]:
        """Ranks whose heart stands still and that have not said farewell."""
        before, until = self._read(), time.monotonic() + GONE_AFTER_SECONDS
        while time.monotonic() < until:
            self._publish()  # the thread that does so otherwise may be this one
            time.sleep(HEARTBEAT_SECONDS / 2)
        store = self._store
        return {
            rank: now
            for rank, now in self._read().items()
            if rank in before
            and now.beats == before[rank].beats
            and not (store is not None and store.check([f"farewell/of/{rank}"]))
        }

    def _say_farewell(self, error: Exception) -> int:
        """Publishes the reason; returns how many ranks, with this one, have said theirs."""
        assert self._store is not None
        rank = distributed.rank()
        message = str(error) if type(error).__name__ in KINDS else f"{type(error).__name__}: {error}"
        self._store.set(f"farewell/of/{rank}", "")
        number = int(self._store.add("farewells", 1))
        self._store.set(
            f"farewell/{number}", json.dumps({"rank": rank, "kind": type(error).__name__, "message": message})
        )
        return number

    def _end_stuck_run(self, standing: float) -> None:
        try:
            self._explain_stuck_run(standing)
        finally:
            os._exit(1)

    def _explain_stuck_run(self, standing: float) -> None:
        stacks = self._run_dir / "stacks" / f"rank_{distributed.rank():05d}.txt"
        gone: dict[int, Heartbeat] = {}
        try:
            stacks.parent.mkdir(parents=True, exist_ok=True)
            with stacks.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(all_threads=True)
        try:
            gone, all_ranks = self._gone(), self._read()
            least = min(heart.progress for heart in all_ranks.values())
            behind = gone or {rank: heart for rank, heart in all_ranks.items() if heart.progress == least}
            culprits = f"behind: {_listed(behind)}"
        except dist.DistError as error:
            culprits = f"who is behind cannot be told ({error})"
        message = (
            f"no progress for {standing:.0f} s (train.stuck_after_seconds: {self._stuck_after:g}); "
            f"{culprits}. The stacks of all threads are in {stacks.parent}"
        )
        self._report(gone, message)
        print(f"dpo: [rank {distributed.rank()}] {message}", file=sys.stderr, flush=True)

    def _report(self, gone: dict[int, Heartbeat], message: str) -> None:
        """Leaves exit.json from the first rank that is alive, unless somebody has left it already."""
        file = self._run_dir / "exit.json"
        written = file.is_file() and file.stat().st_mtime >= self._started
        alive = (rank for rank in range(distributed.world_size()) if rank not in gone)
        if distributed.rank() == min(alive) and not written:
            record_end(self._run_dir, self._command, 1, message, self._started)


def _listed(ranks: dict[int, Heartbeat]) -> str:
    return ", ".join(
        f"rank {rank} ({heart.host}, process {heart.pid}, last seen: {heart.doing})"
        for rank, heart in ranks.items()
    )
