"""The optimizer, and its learning rate, which is a function of the optimizer step alone."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpo.config import OptimizationConfig

RMSPROP_SMOOTHING = 0.99
ZERO_HALF = ".lora_B."
"""In peft's names of the half of an adapter that starts at zero."""
RATIO = "learning_rate_ratio"
"""Key of a parameter group that has another learning rate than the run: by this factor."""
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


def make_optimizer(
    module: nn.Module, options: OptimizationConfig, *, zero_half_ratio: float = 1.0
) -> torch.optim.Optimizer:
    """The configured optimizer over the parameters that need a gradient; weight decay on matrices only.

    Args:
        module: What is trained.
        options: The optimizer.
        zero_half_ratio: Learning rate of the halves of adapters that start at zero, over that of the rest.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    fast = [p for name, p in named if zero_half_ratio != 1 and ZERO_HALF in name]
    rest = [p for name, p in named if zero_half_ratio == 1 or ZERO_HALF not in name]
    matrices = [p for p in rest if len(getattr(p, "ds_shape", p.shape)) >= 2]
    others = [p for p in rest if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups: Groups = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": fast, "weight_decay": options.weight_decay, RATIO: zero_half_ratio},
    ]
    return OPTIMIZERS[options.optimizer].make([group for group in groups if group["params"]], options)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every parameter group for the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get(RATIO, 1.0)


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
