"""What benchmarks.speed measures, and the processes that measure it: each system in processes of its own.

Imports neither torch nor dpo's model, so that the process that starts the others is small.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpo.errors import UserError

ROOT = Path(__file__).parents[1]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
SHARED = ROOT.parent / "shared"
WORKS = ("hh", "best4")
TASKS = ("precompute", "train")
SYSTEMS = ("ours", "textbook", "trl")
FAMILIES = ("gpt2", "llama")
PAIRS_PER_PROMPT = {"hh": 1, "best4": 3}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; every process reads it from settings.json."""

    folder: str
    """The work folder: model, pairs, and what the systems write while they are measured."""
    hh: str
    """Anthropic's HH-RLHF, .jsonl or .jsonl.gz."""
    books: str
    """Text, a paragraph a line, .txt or .txt.xz."""
    tokenizer: str
    layers: int
    width: int
    steps: int
    """Optimizer steps of a run, the first included, which is not timed."""
    pairs_per_step: int
    pairs_per_micro_batch: int
    """Of the textbook path and of TRL."""
    max_tokens_per_micro_batch: int
    """Of this system, in training and in precompute."""
    learning_rate: float
    beta: float
    max_length: int
    """Longest prompt + completion, in tokens."""
    threads: int
    seed: int
    family: str = "gpt2"
    """Architecture of the model: one of FAMILIES."""
    gpu: bool = False
    """One GPU instead of the CPU; TRL then takes Liger's kernels."""
    dtype: str = "float32"
    """bfloat16: this system with float32 masters, TRL with autocast over float32 weights."""
    peers_python: str = str(PEERS_PYTHON)
    """Interpreter that has TRL."""

    @classmethod
    def read(cls, path: str) -> "Settings":
        """Reads settings.json."""
        return cls(**json.loads(Path(path).read_text()))

    def work(self, name: str) -> Path:
        """The folder of a work."""
        return Path(self.folder) / name

    @property
    def model(self) -> str:
        """The folder of the model that all systems start from."""
        return str(Path(self.folder) / "model")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one process measured."""

    system: str
    work: str
    task: str
    pairs: int
    """Pairs in `seconds`."""
    seconds: float
    """Time of the steps after the first one, or of the forward passes of precompute; without loading."""
    tokens: int
    """Tokens that went through the layers in `seconds`, without padding."""
    peak_bytes: int
    """Most resident memory since the process began, over its ranks; on a GPU, most allocated there."""
    losses: list[float]
    """Of every optimizer step, the first included; empty for precompute."""

    def print(self) -> None:
        """The line that the parent process reads."""
        print(json.dumps(asdict(self)), flush=True)


class Job(NamedTuple):
    """A process to start, and what it will measure."""

    system: str
    work: str
    tasks: list[str]


def child(settings: Settings, command: Sequence[str], **variables: str) -> list[dict[str, Any]]:
    """Runs a process to its end and returns the JSON objects that it printed, a line each.

    Raises:
        RuntimeError: It failed; with the end of what it said.
        UserError: It ended with status 2; with what it said.
    """
    threads = {name: str(settings.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    device = {} if settings.gpu else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    quiet = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env = {**os.environ, **threads, **device, **quiet, **variables}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise UserError(done.stderr.strip() or done.stdout.strip())
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]


def worker(settings: Settings, action: str, *more: str) -> list[dict[str, Any]]:
    """Runs an action of benchmarks.speed_work in one process."""
    path = f"{settings.folder}/settings.json"
    return child(settings, [sys.executable, "-m", "benchmarks.speed_work", action, path, *more])


def measure(settings: Settings, job: Job) -> list[Measurement]:
    """Measures one system on one work."""
    path = f"{settings.folder}/settings.json"
    found: list[dict[str, Any]] = []
    if job.system == "trl":  # its constructor precomputes, so one process has both numbers
        script = str(ROOT / "benchmarks" / "peers" / "trl_dpo.py")
        found = child(settings, [settings.peers_python, script, path, job.work, *job.tasks])
    for task in job.tasks if job.system == "textbook" else []:
        found += child(settings, [sys.executable, "-m", "benchmarks.textbook", path, job.work, task])
    if job.system == "ours":
        # Precompute has one thread a rank, so that its values do not depend on the number of ranks.
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu.yaml"]
        ranks = ["--num_processes", str(settings.threads), "--main_process_port", "0"]
        module = ["-m", "benchmarks.speed_work", "precompute", path, job.work]
        if "precompute" in job.tasks or not (settings.work(job.work) / "reference").exists():
            alone = [sys.executable, *module]
            found = child(
                settings, alone if settings.gpu else [*launch, *ranks, *module], OMP_NUM_THREADS="1"
            )
        if "train" in job.tasks:
            found += worker(settings, "train", job.work)
    return [Measurement(**one) for one in found if one["task"] in job.tasks]
