"""The optimizer, and its learning rate, which is a function of the optimizer step alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpo.config import OptimizationConfig

RMSPROP_SMOOTHING = 0.99
Groups = list[dict[str, Any]]
"""Parameter groups in torch's format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerKind:
    """What training, planning and the check of disk space need to know of an optimizer."""

    make: Callable[[Groups, OptimizationConfig], torch.optim.Optimizer]
    moments: int
    """float32 numbers that it keeps per parameter."""
    may_be_offloaded: bool
    """Whether DeepSpeed can run it on the host."""


def _adamw(groups: Groups, options: OptimizationConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.adam_betas, fused=True)


def _rmsprop(groups: Groups, options: OptimizationConfig) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, lr=options.learning_rate, alpha=RMSPROP_SMOOTHING)


OPTIMIZERS = {
    "adamw": OptimizerKind(make=_adamw, moments=2, may_be_offloaded=True),
    "rmsprop": OptimizerKind(make=_rmsprop, moments=1, may_be_offloaded=False),
}
"""Name -> kind, for every value of `train.optimizer`."""


def make_optimizer(module: nn.Module, options: OptimizationConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the parameters that need a gradient; weight decay on matrices only."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) >= 2]
    others = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups: Groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return OPTIMIZERS[options.optimizer].make([group for group in groups if group["params"]], options)


def learning_rate(step: int, num_steps: int, options: OptimizationConfig) -> float:
    """The learning rate of an optimizer step: linear warm-up, then the schedule.

    Args:
        step: From 1 to num_steps.
        num_steps: Optimizer steps of the run.
        options: Peak, schedule and warm-up; the warm-up is at most a tenth of the run.
    """
    warmup = min(options.warmup_steps, num_steps // 10)
    if step <= warmup:
        return options.learning_rate * step / warmup
    done = (step - warmup - 1) / max(1, num_steps - warmup)
    if options.schedule == "linear":
        return options.learning_rate * (1 - done)
    if options.schedule == "cosine":
        return options.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return options.learning_rate
