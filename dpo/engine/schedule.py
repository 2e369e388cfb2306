"""The learning rate of every optimizer step."""

import math

from dpo.config import OptimizationConfig


def warmup_steps(num_steps: int, options: OptimizationConfig) -> int:
    """Optimizer steps of the linear warm-up.

    Args:
        num_steps: Optimizer steps of the run.
        options: A share of them, rounded up; or a number of steps, at most a tenth of the run.
    """
    if options.warmup_ratio is not None:
        return math.ceil(round(options.warmup_ratio * num_steps, 6))  # 0.07 * 100 is above 7
    return min(options.warmup_steps, num_steps // 10)


def learning_rate(step: int, num_steps: int, options: OptimizationConfig) -> float:
    """The learning rate of an optimizer step: linear warm-up from 0, then the schedule.

    Args:
        step: From 1 to num_steps.
        num_steps: Optimizer steps of the run.
        options: Peak, schedule, warm-up and the rate that a decay reaches one step after the last.
    """
    warmup, peak, least = warmup_steps(num_steps, options), options.learning_rate, options.min_learning_rate
    if step <= warmup:
        return peak * step / warmup
    done = (step - warmup - 1) / max(1, num_steps - warmup)
    if options.schedule == "linear":
        return least + (peak - least) * (1 - done)
    if options.schedule == "cosine":
        return least + (peak - least) * 0.5 * (1 + math.cos(math.pi * done))
    return peak
