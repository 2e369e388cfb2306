"""Whether the disk can hold what a run will write, and the host's memory a copy of it."""

import os
import shutil
from pathlib import Path

import torch

from dpo.config import ModelConfig, OptimizationConfig
from dpo.engine.optimizer import typical_state_bytes
from dpo.errors import UserError
from dpo.model.load import DTYPES

MASTER_BYTES = 4


def checkpoint_bytes(
    num_parameters: int, dtype: torch.dtype, options: OptimizationConfig, *, sharded: bool
) -> int:
    """Size of one checkpoint in bytes: weights in the compute type, optimizer state, and DeepSpeed's masters.

    Args:
        num_parameters: Trained parameters; others are not saved.
        dtype: The compute type.
        options: The optimizer.
        sharded: Whether DeepSpeed trains.
    """
    weights = dtype.itemsize if sharded else MASTER_BYTES
    masters = MASTER_BYTES if sharded else 0
    return round(num_parameters * (weights + masters + typical_state_bytes(options.optimizer)))


def fits_memory(num_bytes: float) -> bool:
    """Whether a copy takes at most half of the memory that this host has left (Linux; elsewhere never).

    Args:
        num_bytes: Of all ranks of this host together.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        left = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return False
    return num_bytes <= left / 2


def here(num_bytes: int, *, sharded: bool) -> float:
    """Bytes of a checkpoint that the ranks of this host hold, if all hosts have equally many ranks."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return num_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / ranks if sharded else num_bytes


def exported_bytes(model: ModelConfig, num_parameters: int, num_trained: int) -> int:
    """Size of RUN_DIR/model in bytes.

    Args:
        model: Its compute type, and whether an adapter is exported alone.
        num_parameters: Of the whole model.
        num_trained: Those that are trained.
    """
    if model.lora is not None and model.lora.export == "adapter":
        return num_trained * MASTER_BYTES
    return num_parameters * DTYPES[model.dtype].itemsize


def require_space(
    run_dir: Path,
    one: int,
    model: int,
    options: OptimizationConfig,
    num_steps: int,
    num_references: int = 0,
) -> None:
    """Raises UserError if checkpoints and models do not fit the disk, given what the run has written already.

    While one checkpoint is written, `keep_last` others exist.

    Args:
        run_dir: Where.
        one: Bytes of a checkpoint.
        model: Bytes of what is exported.
        options: How many are kept.
        num_steps: Optimizer steps of the whole run.
        num_references: Models that are kept because the reference moves.
    """
    number = options.keep_last + 1 if options.checkpoint_every else 0
    snapshots = num_steps // options.snapshot_every if options.snapshot_every else 0
    models = ((2 if options.keep_best else 1) + snapshots + num_references) * model
    files = (path for path in run_dir.rglob("*") if path.is_file()) if run_dir.is_dir() else ()
    written = sum(path.stat().st_size for path in files)
    place = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free
    if number * one + models > free + written:
        raise UserError(
            f"run_dir: {run_dir} needs about {(number * one + models) / 1e9:,.2f} GB ({number} checkpoints "
            f"of {one / 1e9:,.2f} GB while one is written, and the models), and the disk has "
            f"{(free + written) / 1e9:,.2f} GB for it: make room, choose another run_dir, or lower "
            "train.keep_last"
        )
