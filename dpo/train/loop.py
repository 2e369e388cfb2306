"""The training loop, for preferences and for next tokens alike: score, loss, backward, update, record.

What differs between the two is an `Objective`. The plan fixes the steps without the world size; this rank
takes its share, and every sum is divided by the count of the whole step, so that the gradient is that of one
big batch.
"""

import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dpo import distributed
from dpo.config import OptimizationConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import BatchPlan, Int64s, Step, share
from dpo.data.prefetch import prefetch
from dpo.data.trees import Layout, TreeBatch
from dpo.engine import Engine, learning_rate, token_budget
from dpo.monitor import MetricSums, Monitor
from dpo.train.checkpoint import Progress, save_checkpoint


class Objective(Protocol):
    """What a run minimizes."""

    @property
    def dataset(self) -> TokenizedDataset:
        """Where the groups are."""

    @property
    def unit(self) -> str:
        """What a step is made of, for the bar: pairs or sequences."""

    def count(self, groups: Int64s) -> int:
        """What the step's loss is divided by: its pairs, or its completion tokens."""

    def num_units(self, groups: Int64s) -> int:
        """Pairs or sequences of these groups, for throughput."""

    def batch(self, groups: Int64s, layout: Layout) -> TreeBatch:
        """The tensors of a micro-batch; without groups a batch that predicts nothing."""

    def loss(self, logps: Tensor, batch: TreeBatch, sums: MetricSums) -> Tensor:
        """The sum (not the mean) of the losses of a micro-batch, in nats.

        Args:
            logps: (S,) the policy's log-probs, with gradient.
            batch: What was scored.
            sums: Receives loss and metrics of the real samples, under names without prefix.
        """


Evaluation = Callable[[Engine], dict[str, float]]


def train(
    engine: Engine,
    objective: Objective,
    plan: BatchPlan,
    options: OptimizationConfig,
    monitor: Monitor,
    progress: Progress,
    *,
    run_dir: Path,
    evaluate: Evaluation | None,
    export: Callable[[Path], None],
) -> dict[str, float]:
    """Runs the plan from where `progress` stands, and returns the last evaluation.

    Args:
        engine: Policy and optimizer.
        objective: What is minimized.
        plan: The optimizer steps.
        options: Schedule, micro-batch budget, and how often to evaluate and save.
        monitor: Where numbers go.
        progress: Where the run stands; updated in place.
        run_dir: The run folder.
        evaluate: Held-out metrics of the current policy, or None without held-out data.
        export: Writes the current weights to a folder, for `keep_best`; called on all ranks.

    Raises:
        FloatingPointError: The loss or its gradient is not finite; the last checkpoint stays valid.
    """
    evaluated: dict[str, float] = {}

    def evaluate_now() -> dict[str, float]:
        values = evaluate(engine) if evaluate else {}
        monitor.record(progress.step, values)
        best = math.inf if progress.best_loss is None else progress.best_loss
        if options.keep_best and values and values["eval/loss"] < best:
            progress.best_loss = values["eval/loss"]
            export(run_dir / "best")
        return values

    if evaluate and progress.step == 0:
        evaluated = evaluate_now()
    for number in range(progress.step + 1, plan.num_steps + 1):
        step = plan.step(number)
        values = train_step(engine, objective, step, options, learning_rate(number, plan.num_steps, options))
        progress.step, progress.num_tokens = number, progress.num_tokens + int(values["num_tokens"])
        values["num_tokens"] = progress.num_tokens
        named = {
            name if name.startswith("perf/") else f"train/{name}": value for name, value in values.items()
        }
        monitor.record(number, named)
        monitor.advance(named)
        last = number == plan.num_steps
        if evaluate and (last or _due(number, options.evaluate_every)):
            evaluated = evaluate_now()
        if options.checkpoint_every and (last or _due(number, options.checkpoint_every)):
            save_checkpoint(engine, progress, run_dir, options.keep_last)
    return evaluated


def train_step(
    engine: Engine, objective: Objective, step: Step, options: OptimizationConfig, rate: float
) -> dict[str, float]:
    """One optimizer step over all ranks; returns its metrics, equal on all of them."""
    started = time.perf_counter()
    sizes = objective.dataset.sizes(step.groups, engine.layout)
    shares = share(
        sizes,
        world_size=distributed.world_size(),
        budget=token_budget(options.max_tokens_per_micro_batch),
    )
    micro_batches = shares[distributed.rank()]

    def build(positions: list[int]) -> TreeBatch:
        return objective.batch(step.groups[positions], engine.layout).to(engine.device)

    count = objective.count(step.groups)
    sums, waited, tokens = MetricSums(), 0.0, np.zeros(3)
    batches = prefetch(build, micro_batches)
    for index in range(len(micro_batches)):
        fetching = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - fetching
        tokens += batch.num_real_tokens, batch.num_row_tokens, batch.input_ids.numel()
        loss = objective.loss(engine.score(batch), batch, sums)
        engine.accumulate(loss / count, last=index == len(micro_batches) - 1)
    metrics = sums.means()
    if not math.isfinite(metrics["loss"]):  # on all ranks alike, and before any weight has changed
        raise FloatingPointError(
            f"step {step.number}: the loss is {metrics['loss']}; the weights were not updated"
        )
    norm = engine.update(rate)
    if not math.isfinite(norm):
        raise FloatingPointError(f"step {step.number}: the gradient norm is {norm}")
    real, in_rows, padded = distributed.sum_over_ranks(tokens)
    loads = [sizes.work[np.concatenate(own).astype(int)].sum() for own in shares]
    seconds = time.perf_counter() - started
    return {
        **metrics,
        "grad_norm": norm,
        "learning_rate": rate,
        "epoch": step.epoch,
        "num_tokens": real,
        "perf/tokens_per_second": real / seconds,
        f"perf/{objective.unit}_per_second": objective.num_units(step.groups) / seconds,
        "perf/data_wait_fraction": waited / seconds,
        "perf/padding_fraction": 1 - real / padded,
        "perf/shared_prefix_fraction": 1 - real / in_rows,
        "perf/rank_imbalance": float(np.max(loads) / np.mean(loads) - 1),
        "perf/peak_memory_gb": peak_memory_bytes() / 1e9,
    }


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def peak_memory_bytes() -> int:
    """Most memory this process has held: the GPU's allocations, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
