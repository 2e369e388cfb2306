"""Ranks without the launcher: forked in milliseconds from a process that has imported everything already.

What a test kills by the dozen cannot afford the launcher's ten seconds; the launcher has tests of its own.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["dpo.cli", "dpo.commands", "ranks"])


def start_ranks(
    world_size: int, arguments: Sequence[str], logs: Path, *, folders: Sequence[Path] | None = None
) -> list[ForkServerProcess]:
    """Starts `dpo ARGUMENTS` on real ranks over gloo; `folders` are their working directories."""
    logs.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world_size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        folder = folders[rank] if folders else None
        given = (environment if world_size > 1 else {}, list(arguments), logs / f"rank{rank}.log", folder)
        processes.append(FORKS.Process(target=_work, args=given))
        processes[-1].start()
    return processes


def run_ranks(
    world_size: int, arguments: Sequence[str], logs: Path, *, folders: Sequence[Path] | None = None
) -> tuple[list[int | None], str]:
    """Runs them to the end; returns their exit statuses and what all of them said."""
    return wait(start_ranks(world_size, arguments, logs, folders=folders)), said(logs)


def wait(processes: Sequence[ForkServerProcess], seconds: float = 120) -> list[int | None]:
    """Exit statuses, negative for a signal; a rank that hangs is killed and has None."""
    for process in processes:
        process.join(seconds)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return statuses


def said(logs: Path) -> str:
    """What the ranks printed, rank after rank."""
    return "\n".join(path.read_text() for path in sorted(logs.glob("rank*.log")))


def _work(environment: dict[str, str], arguments: list[str], log: Path, folder: Path | None) -> None:
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
    from dpo.cli import run

    sys.exit(run(arguments))
