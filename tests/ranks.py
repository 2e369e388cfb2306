"""Ranks without the launcher: forked in milliseconds from a process that has already imported everything.

Tests that start ranks dozens of times cannot afford the launcher's ten seconds; it has its own tests.
"""

import gc
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [f"dpo.commands.{name}" for name in ("train", "sft", "evaluate", "precompute_ref")]
    + ["dpo.cli.main", "deepspeed"]
    # What is imported late, when an engine or a model starts, and costs every rank a second or more.
    + ["deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.ops.op_builder.all_ops", "pyarrow.compute"]
    + ["setuptools", "torch.utils.cpp_extension"]
    + [f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "llama")]
)
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed searches for accelerators when imported


def start_ranks(
    world_size: int,
    arguments: Sequence[str],
    logs: Path,
    *,
    folders: Sequence[Path] | None = None,
    variables: Mapping[str, str] | None = None,
    before: str = "",
) -> list[ForkServerProcess]:
    """Starts `dpo ARGUMENTS` on real ranks over gloo.

    Args:
        world_size: Number of ranks.
        arguments: The command line after `dpo`.
        logs: Folder for their output, one file per rank.
        folders: Working directory of each rank.
        variables: Further environment variables.
        before: Code that each rank runs first, to break something.
    """
    logs.mkdir(parents=True, exist_ok=True)
    port = free_port()
    processes = []
    for rank in range(world_size):
        folder = folders[rank] if folders else None
        alone = world_size == 1 and not variables
        environment = {} if alone else rank_environment(rank, world_size, port) | dict(variables or {})
        given = (environment, list(arguments), logs / f"rank{rank}.log", folder, before)
        processes.append(start_rank(_work, *given))
    return processes


def start_rank(work: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """Starts a function in a process of its own."""
    process = FORKS.Process(target=_run, args=(work, arguments))
    process.start()
    return process


def _run(work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    gc.freeze()  # DeepSpeed collects garbage for each engine: 0.3 s where it looks at all that was imported
    work(*arguments)


def free_port() -> int:
    """A port that is not in use."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Environment variables that the launcher would set for a rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }


def run_ranks(
    world_size: int, arguments: Sequence[str], logs: Path, *, folders: Sequence[Path] | None = None
) -> tuple[list[int | None], str]:
    """Runs ranks until they exit; returns their exit statuses and their output."""
    return wait(start_ranks(world_size, arguments, logs, folders=folders)), output_of(logs)


def wait(processes: Sequence[ForkServerProcess], seconds: float = 120) -> list[int | None]:
    """Exit statuses, negative for a signal; None for a rank that hung and was killed."""
    for process in processes:
        process.join(seconds)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return statuses


def output_of(logs: Path) -> str:
    """What the ranks printed, in order of ranks."""
    return "\n".join(path.read_text() for path in sorted(logs.glob("rank*.log")))


def _work(
    environment: dict[str, str], arguments: list[str], log: Path, folder: Path | None, before: str
) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ |= {**environment, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    if folder is not None:
        os.chdir(folder)
    import torch

    torch.set_num_threads(1)
    from dpo.cli.main import run

    exec(before, {})
    sys.exit(run(arguments))
