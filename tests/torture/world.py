"""Starts a run, breaks it as planned, and reports what was left: processes, records, files."""

import ctypes
import os
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import rig as rig_module
from rig import Rig, Started

from torture.plan import STUCK_AFTER, Fault, Seed

LONGEST, UNDISTURBED = 60.0, 300.0
"""Seconds after which an attempt counts as hanging, and the undisturbed one, which the others wait for."""
PATIENCE = 3.0
"""How many times as long as the undisturbed one an attempt may take, on a busy machine."""
TOKEN = "TORTURE_ATTEMPT"
ARM = """
import ctypes, os
if os.environ.get("RANK", "0") == "{rank}":
    ctypes.CDLL(None).torture_arm(
        {action}, {part!r}.encode(), {kinds}, {nth}, {how_often}, {value}, {mark!r}.encode()
    )
"""


def compile_library(folder: Path) -> Path:
    """Compiles injected.c, for LD_PRELOAD."""
    library = folder / "injected.so"
    source = Path(__file__).with_name("injected.c")
    command = ["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


@dataclass(kw_only=True)
class Attempt:
    """How one attempt ended."""

    faults: list[Fault]
    """Those that happened."""
    statuses: list[int | None]
    """Of the ranks, or of launch/run."""
    record: dict[str, Any]
    """exit.json; empty if there is none."""
    output: str
    seconds: float
    hanging: list[str] = field(default_factory=list)
    """Processes that had to be killed, apart from those that the attempt itself has stopped."""
    second: "Attempt | None" = None
    """The second launch into the same folder."""
    second_at: float = 0.0
    """When that was started, in seconds since 1970."""


@dataclass(kw_only=True)
class World:
    """Where a seed's run is."""

    rig: Rig
    seed: Seed
    folder: Path
    """Everything that the run itself writes."""

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def attempt(self, faults: list[Fault], duration: float | None, *, last: bool = False) -> Attempt:
        """One start of the command, and what happens to it.

        Args:
            faults: What happens.
            duration: Seconds that the undisturbed attempt took; None: it is that one.
            last: Whether it may have another number of ranks.
        """
        longest = UNDISTURBED if duration is None else max(LONGEST, PATIENCE * duration)
        world_size = self.seed.last_ranks if last else self.seed.ranks
        token = f"{self.folder.name}_{time.monotonic_ns()}"
        # The undisturbed attempt may be the first on this machine: DeepSpeed then compiles an extension.
        patience = UNDISTURBED if duration is None else STUCK_AFTER
        started = self._start(faults, token, world_size, patience)
        happened = {fault for fault in faults if fault.call is None and fault.kind != "second launch"}
        second, second_at = None, 0.0
        for fault in sorted((fault for fault in faults if fault.call is None), key=lambda fault: fault.at):
            time.sleep(max(0.0, started.began + fault.at * (duration or 0.0) - time.monotonic()))
            if fault.kind == "second launch":
                second_at = time.time()
                other = self._start([], f"{token}_second", world_size, patience)
                second = self._end(other, [], f"{token}_second", longest, read_record=False)
                happened.add(fault)
            elif not self._break(fault, started, token):
                happened.discard(fault)
        ended = self._end(started, faults, token, longest, read_record=True)
        happened |= {fault for n, fault in enumerate(faults) if self._mark(token, n).exists()}
        ended.faults = [fault for fault in faults if fault in happened]
        ended.second, ended.second_at = second, second_at
        return ended

    def _start(self, faults: list[Fault], token: str, world_size: int, stuck_after: float) -> Started:
        before = "".join(
            ARM.format(
                rank=fault.rank,
                part=f"/{self.folder.name}/",
                mark=str(self._mark(token, number)),
                action=fault.call.action,
                kinds=fault.call.kinds,
                nth=fault.call.nth,
                how_often=fault.call.how_often,
                value=fault.call.value,
            )
            for number, fault in enumerate(faults)
            if fault.call is not None
        )
        rig_module.LAUNCHER = self.seed.launcher
        more = ["--train.stuck_after_seconds", str(stuck_after), "--evaluate.num_prompts", "2"]
        more += ["--evaluate.completion_tokens", "4", "--reference.flush_every_seconds", "0.05"]
        more += ["--train.checkpoint_async", "true"]
        if self.seed.own_data:
            more += ["--data.cache_dir", str(self.folder / "tokenized")]
        if self.seed.stage == "precompute-ref":
            more += ["--reference.cache_dir", str(self.folder / "reference")]
        return self.rig.start(
            "run",
            *more,
            world_size=world_size,
            stage=self.seed.engine,
            command=self.seed.stage,
            before=before,
            place=self.folder,
            variables={TOKEN: token, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20"},
        )

    def _mark(self, token: str, number: int) -> Path:
        return self.rig.folder / f"{token}.{number}.fired"

    def _break(self, fault: Fault, started: Started, token: str) -> bool:
        tree = processes_of(started, token)
        if not tree:
            return False
        pid = tree[min(len(tree) - 1, int(fault.whom * len(tree)))]
        numbers = {"kill of a process": signal.SIGKILL, "signal": fault.number, "stop and go": signal.SIGSTOP}
        try:
            os.kill(pid, numbers[fault.kind])
            if fault.pause is not None:
                time.sleep(fault.pause)
                os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            return False
        return True

    def _end(
        self, started: Started, faults: list[Fault], token: str, longest: float, *, read_record: bool
    ) -> Attempt:
        until, hanging = time.monotonic() + longest, []
        for_ever = any(fault.kind == "stop for ever" for fault in faults)
        while left := processes_of(started, token):
            stops = [pid for pid in left if state_of(pid) in "Tt"]
            if for_ever and stops and len(stops) == len(left):
                for pid in stops:  # as a launcher does in the end
                    os.kill(pid, signal.SIGKILL)
            elif time.monotonic() > until:
                hanging = [f"{pid} ({state_of(pid)}): {command_of(pid)}" for pid in left]
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        ended = started.end(20)
        return Attempt(
            faults=[],
            statuses=list(ended.statuses),
            record=rig_module._read_json(self.run_dir / "exit.json") if read_record else {},
            output=ended.output,
            seconds=time.monotonic() - started.began,
            hanging=hanging,
        )


def processes_of(started: Started, token: str) -> list[int]:
    """The living processes of an attempt, the launcher first."""
    first = [process.pid for process in started.processes]
    ranks = [int(text) for file in (started.folder / "pids").iterdir() if (text := file.read_text())]
    marked = f"{TOKEN}={token}".encode()
    tree = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if marked in (place / "environ").read_bytes().split(b"\0"):
                tree.append(int(place.name))
        except OSError:
            continue
    return [pid for pid in dict.fromkeys([*first, *sorted(tree), *ranks]) if state_of(pid) not in "ZX-"]


def state_of(pid: int) -> str:
    """R, S, D, T, Z as in /proc; - for one that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "-"


def command_of(pid: int) -> str:
    """A process's command line, for people."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:200]
    except OSError:
        return "?"


def is_loaded() -> bool:
    """Whether this process was started with the library."""
    return hasattr(ctypes.CDLL(None), "torture_arm")
