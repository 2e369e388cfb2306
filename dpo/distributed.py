"""Ranks, barriers, exact sums and agreement: the few collectives the stages need.

A single process that was not launched gets the same functions with a world of one.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from accelerate import PartialState

T = TypeVar("T")

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""Rank 0 may tokenize or hash a large input while the others wait; PyTorch's 10 minutes are too short for
that."""


def start() -> None:
    """Joins the process group that the launcher described; safe to call twice.

    Without an accelerator the backend must be named: Accelerate otherwise leaves it unset under DeepSpeed and
    every rank believes that it is alone.
    """
    if "WORLD_SIZE" not in os.environ:
        PartialState()
        return
    backend = None if torch.cuda.is_available() else "gloo"
    options: dict[str, Any] = {"timeout": COLLECTIVE_TIMEOUT} | ({"backend": backend} if backend else {})
    PartialState(**options)
    if (
        backend and os.environ.get("OMP_NUM_THREADS", "1") == "1"
    ):  # the launcher's default, not a person's wish
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))


def is_distributed() -> bool:
    """Whether a process group of more than one rank is up."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number in the world, from 0."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def is_main() -> bool:
    """Whether this process writes files and bars: global rank 0 (not one a node)."""
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
        dist.barrier()


def sum_over_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Element-wise float64 sum over ranks, equal on all of them.

    Args:
        values: (N,) this rank's sums and counts.
    """
    if not is_distributed():
        return values
    tensor = torch.as_tensor(values, dtype=torch.float64).to(device())
    dist.all_reduce(tensor)
    return tensor.cpu().numpy()


def gather_objects(value: T) -> list[T]:
    """Every rank's value, in rank order, on every rank. For records of a few megabytes, not for tensors."""
    if not is_distributed():
        return [value]
    gathered: list[T] = [value] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def from_main(value: T) -> T:
    """Rank 0's value on every rank."""
    if not is_distributed():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def share_of(items: Sequence[T]) -> list[T]:
    """This rank's part of a list of work items: every world_size-th."""
    return list(items[rank() :: world_size()])
