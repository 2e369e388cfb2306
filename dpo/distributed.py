"""Ranks, barriers, float64 sums and agreement: the collectives that all stages use, and shared folders.

In a single process that was not launched the same functions work with a world of one.
"""

import itertools
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from socket import gethostname
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from accelerate import PartialState

from dpo import alive, terminal
from dpo.errors import RunFailed, UserError
from dpo.files import remove_abandoned, temporary_of
from dpo.processes import end_with_launcher, remove_abandoned_build_locks

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(days=1)
"""Rank 0 may tokenize or hash a large input while the others wait; the watchdog ends what hangs."""
SHARED_WAIT_SECONDS = 10.0
_counts_made = itertools.count()


def start() -> None:
    """Joins the process group that the launcher described; safe to call twice.

    Without an accelerator the backend must be named: Accelerate otherwise leaves it unset under DeepSpeed,
    and every rank assumes a world of one.
    """
    _warn_of_unseen_gpus()
    end_with_launcher()
    if "WORLD_SIZE" not in os.environ:
        PartialState()
        return
    backend = None if torch.cuda.is_available() else "gloo"
    if not trains_without_deepspeed():
        if os.environ.get("LOCAL_RANK", "0") == "0":
            remove_abandoned_build_locks()
        if backend:
            _without_op_for_inference()
    options: dict[str, Any] = {"timeout": COLLECTIVE_TIMEOUT} | ({"backend": backend} if backend else {})
    PartialState(cpu=trains_on_cpu_alone(), **options)
    if is_distributed():
        _on_host()
    if backend and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # the launcher's default, not the user's
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))


def _without_op_for_inference() -> None:
    """Keeps DeepSpeed from compiling its all-reduce for inference when it joins a group on CPUs.

    Training does not call it, and the first start on a machine would wait for the build and need g++.
    """
    import deepspeed.ops  # here: DeepSpeed looks for devices when imported

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@cache
def _on_host() -> dist.ProcessGroup | None:
    """The group for objects, barriers and float64 sums: gloo's, whose ranks fail at once when one is gone.

    NCCL's wait in the driver, where nothing reaches them. None: the default group is gloo's.
    """
    if not torch.cuda.is_available():
        return None
    group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    return group


def trains_without_deepspeed() -> bool:
    """Whether the launcher has not asked for DeepSpeed."""
    return os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true"


@cache
def _warn_of_unseen_gpus() -> None:
    """Says once, on rank 0, that this machine has GPUs and torch does not see them."""
    unwanted = os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1")
    if torch.cuda.is_available() or unwanted or os.environ.get("RANK", "0") != "0":
        return
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return
    if found := sum(line.startswith("GPU") for line in listed.splitlines()):
        terminal.warning(
            f"this machine has {found} GPU(s) and torch {torch.__version__} sees none, so the CPU is used: "
            "install a torch with CUDA and its driver, or set CUDA_VISIBLE_DEVICES= if the CPU is meant"
        )


def leave() -> None:
    """Leaves the process group at the end of a run that all ranks ended alike; safe without a group.

    NCCL's communicators are closed on every rank before rank 0, which keeps the store, exits. Gloo has
    nothing to close, and may abort the process here (pytorch/pytorch#190489).
    """
    if dist.is_available() and dist.is_initialized() and "nccl" in dist.get_backend():
        dist.destroy_process_group()


def trains_on_cpu_alone() -> bool:
    """Whether this is DDP on CPUs: no accelerator, no DeepSpeed.

    Accelerate must be told, or it wraps nothing and every rank trains alone; under DeepSpeed it must not be
    told, or it turns DeepSpeed off.
    """
    return not torch.cuda.is_available() and trains_without_deepspeed()


def is_distributed() -> bool:
    """Whether a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this process writes files and bars: global rank 0, not one per node."""
    return rank() == 0


def device() -> torch.device:
    """The device of this process."""
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def barrier() -> None:
    """Waits for every rank."""
    if is_distributed():
        with alive.waiting():
            dist.barrier(group=_on_host())


def sum_over_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Element-wise float64 sum over ranks, equal on all of them.

    Args:
        values: (N,) this rank's sums and counts.
    """
    if not is_distributed():
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    with alive.waiting():
        dist.all_reduce(tensor, group=_on_host())
    return tensor.numpy()


def any_rank(value: bool) -> bool:
    """Whether `value` is true on at least one rank; the same answer on all."""
    return bool(sum_over_ranks(np.array([float(value)]))[0])


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank. For records of a few megabytes, not for tensors."""
    if not is_distributed():
        return [value]
    gathered: list[T] = [value] * world_size()
    with alive.waiting():
        dist.all_gather_object(gathered, value, group=_on_host())
    return gathered


def from_main(value: T) -> T:
    """Rank 0's value on every rank."""
    if not is_distributed():
        return value
    box = [value]
    with alive.waiting():
        dist.broadcast_object_list(box, src=0, group=_on_host(), device=torch.device("cpu"))
    return box[0]


def on_main(work: Callable[[], T]) -> T:
    """Rank 0's result of `work` on every rank; a UserError of rank 0 is raised on all of them."""
    result: T | UserError | None = None
    if is_main():
        try:
            result = work()
        except UserError as error:
            result = error
    result = from_main(result)
    if isinstance(result, UserError):
        raise result
    return cast(T, result)


def on_each_node(work: Callable[[int, int], T]) -> T:
    """Runs `work(node, number of nodes)` on the first rank of each node; the others sleep until all are done.

    Returns:
        Rank 0's result, on every rank; an error of the first node that has one is raised on all of them.
    """
    firsts = [r for r, local in enumerate(gather_objects(os.environ.get("LOCAL_RANK", "0"))) if local == "0"]
    done = SharedCount("nodes")
    result: T | UserError | RunFailed | None = None
    if rank() in firsts:
        try:
            result = work(firsts.index(rank()), len(firsts))
        except (UserError, RunFailed) as error:
            result = error
        done.add(1)
    with alive.waiting():
        while done.add(0) < len(firsts):  # work may outlast the timeout of a collective
            time.sleep(0.2)
    results = gather_objects(result)
    for found in results:
        if isinstance(found, UserError | RunFailed):
            raise found
    return cast(T, results[0])


class SharedCount:
    """A counter that ranks add to without waiting for each other."""

    def __init__(self, name: str) -> None:
        self._name = f"dpo/{name}/{next(_counts_made)}"  # ranks create the same counters in the same order
        self._total = 0

    def add(self, number: int) -> int:
        """Adds this rank's number and returns the sum over all ranks so far."""
        if is_distributed():
            self._total = int(dist.distributed_c10d._get_default_store().add(self._name, number))
        else:
            self._total += number
        return self._total


def require_shared(folder: Path, key: str) -> None:
    """Raises UserError on all ranks if one of them does not see what rank 0 writes into `folder`.

    Args:
        folder: Is made if it is not there.
        key: The option that names it, for the message.
    """
    name = on_main(lambda: _leave_token(folder, key))
    seen, deadline = (folder / name).is_file(), time.monotonic() + SHARED_WAIT_SECONDS
    while not seen and time.monotonic() < deadline:  # a network file system may show a new file late
        alive.advanced()
        time.sleep(0.1)
        seen = (folder / name).is_file()
    views = gather_objects((seen, gethostname(), str(folder.absolute())))
    if is_main():
        (folder / name).unlink(missing_ok=True)
    blind = [f"rank {r} on {host} ({path})" for r, (sees, host, path) in enumerate(views) if not sees]
    if blind:
        raise UserError(
            f"{key}: {folder} is not shared: what rank 0 on {views[0][1]} wrote to {views[0][2]} is not seen "
            f"by {', '.join(blind)}. Give an absolute path on storage that all nodes mount"
        )


def _leave_token(folder: Path, key: str) -> str:
    name = temporary_of(folder / "shared").name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        (folder / name).touch()
    except OSError as error:
        raise UserError(
            f"{key}: cannot write to {folder} ({error.strerror}); expected a folder with room that you may "
            "write to"
        ) from error
    return name


def share_of(items: Sequence[T]) -> list[T]:
    """This rank's part of a list of work items: every world_size-th."""
    return list(items[rank() :: world_size()])


def turns_of(items: Sequence[T]) -> list[T | None]:
    """`share_of` with equally many entries on every rank, padded with None.

    For work in which all ranks must take part, such as a forward pass of a sharded model.
    """
    mine: list[T | None] = [*share_of(items)]
    return mine + [None] * (-(-len(items) // world_size()) - len(mine))
