"""Names a rank that died, and ends a run that got stuck, from a thread that no call of the main one stops.

What it knows of this rank is `dpo.alive`, of the others `dpo.guards.hearts`. A rank whose collective fails
asks it which rank is gone. Where the main thread cannot notice, since it waits in a C call as NCCL's do, this
thread ends the process some seconds after another rank has ended or died. A rank without a sign of life for
too long is ended too, with the stacks of its threads.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist

from dpo import alive, distributed
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.guards import hearts
from dpo.guards.hearts import End, Hearts, behind, gone, listed
from dpo.tracking.exit_record import record_end
from dpo.tracking.run_folder import RunFolder

GRACE_SECONDS = 10.0
"""For the main thread to notice by itself that another rank has ended."""
PAUSED_SECONDS = 5.0
"""A thread that wakes up so much too late was stopped, with its whole process."""
BUSY = 0.02
"""Share of a core that a thread which loads uses at least."""
BUSY_BYTES = 65536
"""Bytes per second that a process which loads or downloads moves at least."""
IS_GONE = "is gone: killed, or out of memory"
STATUS = {UserError: 2, StoppedBySignal: 3}
Answer = TypeVar("Answer")


class Watchdog:
    """This rank's heartbeats, and what those of the other ranks say."""

    def __init__(self, folder: RunFolder, command: str, stuck_after_seconds: float) -> None:
        """Nothing happens before it is entered.

        Args:
            folder: Where stacks and exit.json go.
            command: For exit.json.
            stuck_after_seconds: Longest time without a sign of life; see `dpo.alive`.
        """
        self._folder, self._command = folder, command
        self._stuck_after, self._started = stuck_after_seconds, time.time()
        self._record_before = _version(folder.exit_record)
        self._parent = os.getppid()
        self._ended, self._ending = threading.Event(), False
        self._hearts: Hearts | None = None
        self._first_end: End | None = None
        self._store_is_gone = self._suspects = False
        self._heard_at = 0.0
        self._trouble_since: float | None = None
        self._looked_at, self._work = time.monotonic(), _work_done()

    def listen(self) -> None:
        """The process group is up: from now on the ranks hear of each other."""
        if distributed.is_distributed():
            hearts_of_all = Hearts()
            hearts_of_all.beat()
            self._hearts, self._heard_at = hearts_of_all, time.monotonic()
            Thread(target=self._hear, args=(hearts_of_all,), name="heartbeats", daemon=True).start()

    def explain(self, error: Exception) -> Exception:
        """The reason for an error of this rank: a rank that is gone, one that failed first, or itself.

        Takes some seconds, in which the others see that this rank is alive.
        """
        self._ending = True
        alive.advanced()  # or the wait that has just failed would count as a hang meanwhile
        if self._hearts is None:
            return error
        try:
            first = self._hearts.publish_end(error, of=distributed.rank()) == 1
            missing = gone(self._hearts.silent())
            if missing:
                reason: Exception = RunFailed(f"{listed(missing)} {IS_GONE}")
            elif first:
                return error
            else:
                reason = _reason(self._hearts.first_end(), error)
            if 0 in missing:
                self._report(missing, reason)
        except dist.DistError:
            reason = self._without_store(error)
        return reason

    def publish_end(self, error: Exception) -> None:
        """Tells the other ranks why this one ends, so that they report the same reason."""
        self._ending = True
        if self._hearts is not None:
            with suppress(dist.DistError):  # the rank that holds the store has ended already
                self._hearts.publish_end(error, of=distributed.rank())

    def __enter__(self) -> "Watchdog":
        self._looked_at, self._work = time.monotonic(), _work_done()
        alive.loading("joining the other ranks")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends the thread, and says so."""
        self._ended.set()
        if self._hearts is not None and error is None:
            with suppress(dist.DistError):
                self._hearts.leave()
        self._thread.join(timeout=2 * hearts.HEARTBEAT_SECONDS)

    def _watch(self) -> None:
        while not self._ended.is_set():
            self._look_at_this_rank()
            # a store that went with the launcher is no trouble: the kernel has signalled this rank
            unheard = self._hearts is not None and self._others() is None and os.getppid() == self._parent
            self._end_after_others(self._suspects or unheard)
            self._end_if_stuck()
            self._ended.wait(hearts.HEARTBEAT_SECONDS)

    def _hear(self, others: Hearts) -> None:
        """Beats and listens in a thread of its own, which a store that does not answer stops."""
        while not self._ended.is_set():
            try:
                self._suspects = self._look_at_others(others)
            except dist.DistError:
                self._store_is_gone = True
                return
            self._heard_at = time.monotonic()
            self._ended.wait(hearts.HEARTBEAT_SECONDS)

    def _answer(self, ask: Callable[[], Answer]) -> Answer:
        """What the store answers, asked in a thread of its own: the process that holds it may be stopped.

        Raises:
            DistError: It does not answer, now or later.
        """
        answers: list[Answer] = []
        failed: list[Exception] = []

        def work() -> None:
            try:
                answers.append(ask())
            except Exception as error:  # raised below
                failed.append(error)

        thread = threading.Thread(target=work, name="question to the store", daemon=True)
        thread.start()
        thread.join(timeout=hearts.SILENT_AFTER_SECONDS + hearts.GONE_AFTER_SECONDS)  # `silent` takes some
        if answers:
            return answers[0]
        self._store_is_gone = True
        raise failed[0] if failed else dist.DistStoreError("the store does not answer")

    def _others(self) -> Hearts | None:
        """Those of the other ranks, as long as the store answers."""
        late = time.monotonic() - self._heard_at > hearts.SILENT_AFTER_SECONDS
        return None if self._store_is_gone or late else self._hearts

    def _look_at_this_rank(self) -> None:
        now, work = time.monotonic(), _work_done()
        passed = now - self._looked_at
        seconds, moved = (new - old for new, old in zip(work, self._work, strict=True))
        if passed > PAUSED_SECONDS + hearts.HEARTBEAT_SECONDS:
            alive.advanced()
            self._trouble_since, self._heard_at = None, now
            if self._hearts is not None:
                self._hearts.forget()
        elif alive.life.loading and (seconds > BUSY * passed or moved > BUSY_BYTES * passed):
            alive.advanced()
        self._looked_at, self._work = now, work

    def _look_at_others(self, others: Hearts) -> bool:
        """Whether one of them has ended or died."""
        others.beat()
        self._first_end = self._first_end or others.first_end()
        return self._first_end is not None or others.suspected()

    def _end_after_others(self, trouble: bool) -> None:
        if not trouble or self._ending:
            self._trouble_since = None
            return
        if self._trouble_since is None:
            self._trouble_since = time.monotonic()
        if time.monotonic() - self._trouble_since < GRACE_SECONDS:
            return
        missing: dict[int, hearts.Heartbeat] = {}
        others = self._others()
        try:
            reason = self._first_end.as_error() if self._first_end else None
            if reason is None and others is not None:
                missing = gone(self._answer(others.silent))
                if not missing:
                    self._trouble_since = None
                    return
                reason = RunFailed(f"{listed(missing)} {IS_GONE}")
        except dist.DistError:
            reason = None
        if not (self._ending or self._ended.is_set()):
            self._end(reason or self._without_store(None), missing)

    def _end_if_stuck(self) -> None:
        life = alive.life
        last, idle = life.advanced_at, time.monotonic() - life.advanced_at
        if idle <= self._stuck_after:
            return
        others = self._others()
        missing: dict[int, hearts.Heartbeat] = {}
        try:
            if others is not None and (life.waits or life.loading):
                if self._answer(partial(others.others_get_on, self._stuck_after)):
                    return
            elif others is None and self._hearts is not None:
                raise dist.DistStoreError("the store does not answer")
            culprits = self._culprits(others)
            if others:
                missing = gone(culprits)
            said = f"behind: {listed(culprits)}" if culprits else "not all ranks have joined"
            stuck = f"no progress for {idle:.0f} s (train.stuck_after_seconds: {self._stuck_after:g}); {said}"
            reason: Exception = RunFailed(f"{stuck}. The stacks of all threads are in {self._folder.stacks}")
        except dist.DistError:
            reason = self._without_store(None)
        if life.advanced_at == last and not self._ended.is_set():
            self._end(reason, missing, after=2 * hearts.HEARTBEAT_SECONDS)

    def _culprits(self, others: Hearts | None) -> dict[int, hearts.Heartbeat]:
        if others is not None:
            return self._answer(lambda: others.silent() or behind(others.read()))
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched > 1 and self._hearts is None:
            return {}
        return {distributed.rank(): hearts.own_heartbeat()}

    def _without_store(self, own: Exception | None) -> Exception:
        """The reason where the store is gone, as far as it is known."""
        if self._first_end is not None:
            return _reason(self._first_end, own)
        reason = RunFailed(f"rank 0, which holds the store of the process group, {IS_GONE}")
        self._report({0: hearts.own_heartbeat()}, reason)
        return reason

    def _end(self, reason: Exception, missing: dict[int, hearts.Heartbeat], *, after: float = 0.0) -> None:
        """Ends the process, whatever its main thread does; `after` seconds, in which others write stacks."""
        status = STATUS.get(type(reason), 1)
        try:
            rank = os.environ.get("RANK", "0")
            if (others := self._others()) is not None:
                with suppress(dist.DistError):
                    self._answer(partial(others.publish_end, reason, of=None))
            self._write_stacks()
            self._report(missing, reason)
            print(f"dpo: [rank {rank}] failed: {reason}", file=sys.stderr, flush=True)
            time.sleep(after)
        finally:
            os._exit(status)

    def _write_stacks(self) -> None:
        name = f"rank_{int(os.environ.get('RANK', '0')):05d}"
        try:
            if not self._folder.may_be_written:
                raise OSError("it is not a run of ours")
            self._folder.stacks.mkdir(parents=True, exist_ok=True)
            with (self._folder.stacks / f"{name}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            if torch.cuda.is_available() and hasattr(torch._C._distributed_c10d, "_dump_nccl_trace_json"):
                trace = torch._C._distributed_c10d._dump_nccl_trace_json()
                (self._folder.stacks / f"{name}_nccl.json").write_bytes(trace)
        except OSError:
            faulthandler.dump_traceback(all_threads=True)

    def _report(self, missing: dict[int, hearts.Heartbeat], reason: Exception) -> None:
        """Writes exit.json from the first rank that is alive, unless it has been written since the start."""
        first = min(set(range(distributed.world_size())) - missing.keys(), default=0)
        if distributed.rank() == first and _version(self._folder.exit_record) == self._record_before:
            status = STATUS.get(type(reason), 1)
            record_end(self._folder, self._command, status, str(reason), self._started)


def _reason(first_end: End | None, own: Exception | None) -> Exception:
    """What another rank has published, as this rank's error; `own` where both were stopped by a signal."""
    assert first_end is not None
    if isinstance(own, StoppedBySignal) and first_end.kind == StoppedBySignal.__name__:
        return own
    return first_end.as_error()


def _version(file: Path) -> tuple[int, int] | None:
    """Changes whenever a file is replaced, whatever the clock says."""
    with suppress(OSError):
        found = file.stat()
        return found.st_ino, found.st_mtime_ns
    return None


def _work_done() -> tuple[float, int]:
    """CPU seconds of the main thread, and bytes that the process has read and written."""
    seconds, moved = 0.0, 0
    with suppress(OSError, AttributeError, TypeError):  # not on Linux
        seconds = time.clock_gettime(time.pthread_getcpuclockid(threading.main_thread().ident or 0))
    with suppress(OSError):
        counts = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
        moved = int(counts["rchar"]) + int(counts["wchar"])
    return seconds, moved
