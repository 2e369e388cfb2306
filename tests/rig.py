"""A small training run on real ranks that a test can break: a tiny model, 60 pairs, 12 steps, a filled cache.

There are two ways to start the ranks. By default they are forked with the environment that the launcher would
set, in a second or two. `launcher=True` starts them through `launch/run`, accelerate and torchelastic;
TEST_LAUNCHER=1 (`make test-faults`) does so everywhere.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from ranks import start_ranks

from dpo.files import write_file

ROOT = Path(__file__).parents[1]
LAUNCHER = os.environ.get("TEST_LAUNCHER") == "1"
RUN = [str(ROOT / "launch" / "run")]
STEPS = 12
OFFLOAD = 33
"""Passed as a ZeRO stage: ZeRO-3 with weights and optimizer on the host."""
NOT_TIMING = ("perf/",)
PIDS = """
import os, pathlib
pathlib.Path(os.environ["PIDS"], os.environ.get("RANK", "0")).write_text(str(os.getpid()))
"""
AT_STEP = """
import os, signal, time
from dpo.train import loop
plain = loop.train_step
def patched(session, *rest):
    if session.progress.step + 1 == {step} and os.environ.get("RANK", "0") in {ranks}:
        {action}
    return plain(session, *rest)
loop.train_step = patched
"""
KILL = "os.kill(os.getpid(), signal.SIGKILL)"
SLOWLY = """
import time
from dpo.train import loop
plain = loop.train_step
def patched(*arguments):
    time.sleep(0.25)
    return plain(*arguments)
loop.train_step = patched
"""


def at_step(step: int, action: str, *ranks: int) -> str:
    """Code that runs `action` on these ranks before a step."""
    return AT_STEP.format(step=step, action=action, ranks=[str(rank) for rank in ranks])


@dataclass
class Started:
    """Running ranks."""

    folder: Path
    run_dir: Path
    processes: Sequence[Any]
    began: float = field(default_factory=time.monotonic)

    def pid(self, rank: int) -> int:
        """Process id of a rank, once it has started."""
        file = self.folder / "pids" / str(rank)
        wait_for(lambda: file.is_file() and file.read_text() != "", 60, f"rank {rank} to start")
        return int(file.read_text())

    def steps(self, number: int) -> None:
        """Waits until this many steps are recorded."""
        wait_for(lambda: len(metrics(self.run_dir)) >= number, 90, f"{number} recorded steps")

    def end(self, seconds: float = 120) -> "Ended":
        """Waits for all ranks to exit; kills and reports those that hang."""
        until = time.monotonic() + seconds
        hanging = False
        for process in self.processes:
            if isinstance(process, subprocess.Popen):
                try:
                    process.wait(max(0.1, until - time.monotonic()))
                except subprocess.TimeoutExpired:
                    hanging = True
                    process.kill()
            else:
                process.join(max(0.1, until - time.monotonic()))
                if process.exitcode is None:
                    hanging = True
                    process.kill()
                    process.join()
        pids = [int(file.read_text()) for file in (self.folder / "pids").iterdir()]
        left = [pid for pid in pids if _alive(pid)]
        record = _read_json(self.run_dir / "exit.json")
        output = "\n".join(
            path.read_text(errors="replace") for path in sorted((self.folder / "logs").iterdir())
        )
        statuses = [
            process.returncode if isinstance(process, subprocess.Popen) else process.exitcode
            for process in self.processes
        ]
        return Ended(
            statuses=statuses,
            status=record.get("status"),
            message=record.get("message", ""),
            output=output,
            seconds=time.monotonic() - self.began,
            hanging=hanging,
            left=left,
        )


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the ranks ended."""

    statuses: list[int]
    """Exit status of each rank, or of launch/run."""
    status: int | None
    """From exit.json."""
    message: str
    """From exit.json."""
    output: str
    """Everything that was printed."""
    seconds: float
    hanging: bool
    left: list[int]
    """Processes that are still running."""


@dataclass(frozen=True)
class Rig:
    """A folder with data, configuration and a filled cache."""

    folder: Path

    def start(
        self,
        run: str,
        *more: str,
        world_size: int = 2,
        stage: int | None = 2,
        command: str = "train",
        before: str = "",
        place: Path | None = None,
        variables: Mapping[str, str] | None = None,
        launcher: bool = False,
    ) -> Started:
        """Starts a command.

        Args:
            run: Name of the run folder.
            more: Further arguments of the command line.
            world_size: Number of ranks.
            stage: ZeRO stage; None runs without DeepSpeed.
            command: Name of the dpo command.
            before: Code that each rank runs first.
            place: Parent of the run folder. Default: the rig's folder.
            variables: Additional environment variables of the ranks.
            launcher: Start through launch/run also without TEST_LAUNCHER.
        """
        place = place or self.folder
        logs = self.folder / f"{run}_logs_{time.monotonic_ns()}"
        (logs / "pids").mkdir(parents=True)
        (logs / "logs").mkdir()
        arguments = [
            command,
            "--config",
            str(self.folder / "config.yaml"),
            "--run_dir",
            str(place / run),
            *more,
        ]
        with contextlib.suppress(OSError):  # the disk may be read-only
            (place / run / "exit.json").unlink(missing_ok=True)
        code = PIDS + before
        variables = {"PIDS": str(logs / "pids"), **(variables or {})}
        if (launcher or LAUNCHER) and stage is not None:
            processes: Sequence[Any] = [self._launch(arguments, logs, world_size, stage, code, variables)]
        else:
            variables = deepspeed_variables(self.folder, stage) | variables
            processes = start_ranks(world_size, arguments, logs / "logs", variables=variables, before=code)
        return Started(logs, place / run, processes)

    def run(self, run: str, *more: str, seconds: float = 120, **options: Any) -> Ended:
        """Starts a command and waits until it ends."""
        return self.start(run, *more, **options).end(seconds)

    def completed(self, run: str, *more: str, **options: Any) -> Path:
        """Runs a command that must succeed; returns the run folder."""
        ended = self.run(run, *more, **options)
        assert set(ended.statuses) == {0}, ended.output[-4000:]
        return self.folder / run

    def _launch(
        self,
        arguments: list[str],
        logs: Path,
        world_size: int,
        stage: int,
        code: str,
        variables: Mapping[str, str],
    ) -> subprocess.Popen[bytes]:
        (logs / "sitecustomize.py").write_text(
            f"import os\nif 'RANK' in os.environ:\n    exec({code!r}, {{}})\n"
        )
        launcher = yaml.safe_load((ROOT / "launch" / "cpu.yaml").read_text())
        file = deepspeed_variables(self.folder, stage)["ACCELERATE_DEEPSPEED_CONFIG_FILE"]
        launcher["deepspeed_config"] = {"deepspeed_config_file": file, "zero3_init_flag": stage >= 3}
        (logs / "cpu.yaml").write_text(yaml.safe_dump(launcher))
        environment = {
            **os.environ,
            **variables,
            "PYTHON": sys.executable,
            "ACCELERATE_CONFIG": str(logs / "cpu.yaml"),
            "NPROC": str(world_size),
            "PYTHONPATH": f"{logs}:{ROOT}",
        }
        with (logs / "logs" / "launch.log").open("wb") as log:
            return subprocess.Popen(
                [*RUN, *arguments],
                env=environment,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )


def make_rig(folder: Path, model: Path, **train: Any) -> Rig:
    """Writes configuration and data and fills the cache; `train` overrides training options."""
    rows = [
        {
            "prompt": f"{n} the cat " + "sat " * (n % 5),
            "chosen": f" good {n}" + " day" * (n % 4),
            "rejected": f" bad {n}",
        }
        for n in range(60)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {
            "train": str(folder / "pairs.jsonl"),
            "test": str(folder / "pairs.jsonl"),
            "cache_dir": str(folder / "tokenized"),
        },
        "reference": {"cache_dir": str(folder / "reference"), "max_tokens_per_batch": 256},
        "evaluate": {"watched_prompts": 0, "completion_tokens": 4},  # under ZeRO-3 a token takes 25 ms
        "train": {
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "schedule": "cosine",
            "pairs_per_step": 10,
            "num_epochs": 2,
            "max_tokens_per_micro_batch": 96,  # 1 to 3 micro-batches per rank and step
            "checkpoint_every": 2,
            "checkpoint_async": False,  # a run that is killed at a step has its checkpoints by then
            "evaluate_every": 3,
            "keep_last": 9,
            **train,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rig = Rig(folder)
    rig.completed("cache", command="precompute-ref", world_size=1, stage=None)
    return rig


def metrics(run_dir: Path) -> list[dict[str, float]]:
    """Complete lines of metrics.jsonl, without the metrics that depend on timing."""
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
    parsed = [json.loads(line) for line in lines if line.endswith("\n")]
    return [{key: value for key, value in line.items() if not key.startswith(NOT_TIMING)} for line in parsed]


def weights(run_dir: Path) -> bytes:
    """Bytes of the exported model."""
    return (run_dir / "model" / "model.safetensors").read_bytes()


def checkpoints(run_dir: Path) -> list[str]:
    """Names in checkpoints/, oldest first."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir())


def wait_for(condition: Any, seconds: float, what: str) -> None:
    """Polls until the condition holds; fails after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def deepspeed_variables(folder: Path, stage: int | None) -> dict[str, str]:
    """Environment variables that accelerate's launcher sets for a rank."""
    if stage is None:
        return {}
    name = "ds_zero3_offload" if stage == OFFLOAD else "ds_zero3" if stage == 3 else "ds_zero2"
    settings = json.loads((ROOT / "configs" / f"{name}.json").read_text())
    settings["zero_optimization"]["stage"] = min(stage, 3)
    file = folder / f"ds_zero{stage}.json"
    write_file(file, json.dumps(settings))  # at once: ranks of another start may be reading it
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(stage >= 3).lower(),
    }


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except OSError:
        return {}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:  # a zombie has exited, but its parent has not waited for it yet
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
