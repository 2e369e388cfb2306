"""The optimizer and its learning rate, which is a function of the optimizer step and nothing else."""

import math
from typing import Any

import torch
from torch import nn

from dpo.config import OptimizationConfig

RMSPROP_SMOOTHING = 0.99


def make_optimizer(module: nn.Module, options: OptimizationConfig) -> torch.optim.Optimizer:
    """AdamW or RMSprop over the module's parameters; weight decay on matrices only."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) >= 2]
    others = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=options.learning_rate, alpha=RMSPROP_SMOOTHING)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.adam_betas, fused=True)


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
