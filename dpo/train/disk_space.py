"""Whether the disk can hold what a run will write, asked before anything is loaded."""

import shutil
from pathlib import Path

import torch

from dpo.config import ModelConfig, OptimizationConfig
from dpo.engine.optimizer import OPTIMIZERS
from dpo.errors import UserError
from dpo.model.load import DTYPES

MASTER_BYTES = 4


def checkpoint_bytes(
    num_parameters: int, dtype: torch.dtype, options: OptimizationConfig, *, sharded: bool
) -> int:
    """Size of one checkpoint: weights in the compute type, and float32 moments, with masters beside them
    where DeepSpeed keeps some.

    Args:
        num_parameters: Those that are trained; others are not in it.
        dtype: The compute type.
        options: The optimizer.
        sharded: Whether DeepSpeed trains.
    """
    weights = dtype.itemsize if sharded else MASTER_BYTES
    masters = MASTER_BYTES if sharded else 0
    return num_parameters * (weights + masters + MASTER_BYTES * OPTIMIZERS[options.optimizer].moments)


def exported_bytes(model: ModelConfig, num_parameters: int, num_trained: int) -> int:
    """Size of RUN_DIR/model.

    Args:
        model: Its compute type, and whether an adapter is exported alone.
        num_parameters: Of the whole model.
        num_trained: Those that are trained.
    """
    if model.lora is not None and model.lora.export == "adapter":
        return num_trained * MASTER_BYTES
    return num_parameters * DTYPES[model.dtype].itemsize


def require_space(run_dir: Path, one: int, model: int, options: OptimizationConfig, num_steps: int) -> None:
    """Raises UserError if checkpoints and model will not fit beside what the run has written already.

    While one is written, `keep_last` others are there.

    Args:
        run_dir: Where.
        one: Bytes of a checkpoint.
        model: Bytes of what is exported.
        options: How many are kept.
        num_steps: Optimizer steps of the whole run.
    """
    number = options.keep_last + 1 if options.checkpoint_every else 0
    snapshots = num_steps // options.snapshot_every if options.snapshot_every else 0
    models = ((2 if options.keep_best else 1) + snapshots) * model
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
