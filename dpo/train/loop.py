"""The training loop, for preferences and for next tokens alike: score, loss, backward, update, record.

What differs between the two is an `Objective`. The plan fixes the steps without the world size; this rank
takes its share, and every sum is divided by the count of the whole step, so that the gradient is that of one
big batch.
"""

import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo import distributed, terminal
from dpo.config import OptimizationConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import BatchPlan, Int64s, Step, share
from dpo.data.prefetch import prefetch
from dpo.data.trees import Layout, TreeBatch
from dpo.engine.engine import Engine
from dpo.engine.optimizer import learning_rate
from dpo.engine.scoring import token_budget
from dpo.errors import RunFailed, StoppedBySignal
from dpo.guards.signals import StopRequestedError, StopRequests
from dpo.guards.watchdog import Watchdog
from dpo.tracking.metrics import Evaluation, MetricSums
from dpo.tracking.monitor import Monitor
from dpo.train.checkpoint import Progress, save_checkpoint
from dpo.train.stopwatch import Stopwatch


class Objective(Protocol):
    """What a run minimizes."""

    @property
    def dataset(self) -> TokenizedDataset:
        """Where the groups are."""

    @property
    def unit(self) -> str:
        """What a step is made of, for the bar: pairs or sequences."""

    @property
    def per_token(self) -> bool:
        """Whether `loss` wants log-probs of tokens instead of sequences."""

    def count(self, groups: Int64s) -> float:
        """What the step's loss is divided by: its pairs, say, or its completion tokens."""

    def num_units(self, groups: Int64s) -> int:
        """Pairs or sequences of these groups, for throughput."""

    def batch(self, groups: Int64s, layout: Layout) -> TreeBatch:
        """The tensors of a micro-batch; without groups a batch that predicts nothing."""

    def loss(self, logps: Tensor, batch: TreeBatch, sums: MetricSums) -> Tensor:
        """The sum (not the mean) of the losses of a micro-batch, in nats.

        Args:
            logps: (S,) the policy's log-probs, or (N,) those of tokens, with gradient.
            batch: What was scored.
            sums: Receives loss and metrics of the real samples, under names without prefix.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where a run is kept, what it does besides steps, and who watches it."""

    folder: Path
    """The run folder."""
    monitor: Monitor
    """Where numbers go."""
    stop: StopRequests
    """Whether this process has been asked to stop."""
    watchdog: Watchdog
    """Is told of every part that is done."""
    fingerprints: dict[str, str]
    """Name -> digest of data and model; for the checkpoints."""
    evaluate: Callable[[], Evaluation] | None
    """Of the current policy on held-out data, or None without; raises `StopRequestedError`."""
    export: Callable[[Path], None]
    """Writes the current weights to a folder, for `keep_best`; called on all ranks."""
    describe: Callable[[list[int]], str]
    """These groups, for people."""
    group_flops: npt.NDArray[np.float64] | None = None
    """(G,) operations of each group's forward and backward pass; None where they cannot be counted."""
    peak_flops: float | None = None
    """What one device can do of them a second, or None where that is not known."""


def train(
    engine: Engine,
    objective: Objective,
    plan: BatchPlan,
    options: OptimizationConfig,
    progress: Progress,
    run: Run,
) -> dict[str, float]:
    """Runs the plan from where `progress` stands, and returns the last evaluation.

    Args:
        engine: Policy and optimizer.
        objective: What is minimized.
        plan: The optimizer steps.
        options: Schedule, micro-batch budget, and how often to evaluate and save.
        progress: Where the run stands; updated in place.
        run: The folder and everything around the steps.

    Raises:
        StoppedBySignal: A rank was asked to stop; a checkpoint of the last step is there.
        RunFailed: Too many steps in a row had a number that is not finite.
        UserError: A checkpoint could not be written.
    """
    evaluated: dict[str, float] = {}
    saved, stopping = progress.step, False
    run.stop.wait_for_step()
    while True:
        last = progress.step == plan.num_steps
        due = last or progress.step == 0 or _due(progress.step, options.evaluate_every)
        if run.evaluate and due and progress.evaluated_step < progress.step and not stopping:
            try:
                evaluated = _evaluate(run.evaluate, progress, run, keep_best=options.keep_best)
            except StopRequestedError:
                stopping = True
        if progress.step and _due(progress.step, options.snapshot_every) and not stopping:
            _keep_snapshot(run, progress.step)
        keep = options.checkpoint_every and (last or _due(progress.step, options.checkpoint_every))
        # Weights that stopped giving finite numbers must not push out the last good ones.
        if saved < progress.step and (stopping or (keep and (last or not progress.skipped_in_a_row))):
            run.monitor.sync()
            working = run.watchdog.progress
            save_checkpoint(
                engine, progress, run.folder, options.keep_last, run.fingerprints, working=working
            )
            saved = progress.step
        if stopping:
            run.stop.ignore_more()
            distributed.barrier()
            raise StoppedBySignal(
                f"a checkpoint of step {saved} is in {run.folder}; the same command goes on from there"
                if saved
                else "no step was made; the same command starts again"
            )
        if last:
            return evaluated
        stopping = _advance(engine, objective, plan, options, progress, run)


def _evaluate(
    evaluate: Callable[[], Evaluation], progress: Progress, run: Run, *, keep_best: bool
) -> dict[str, float]:
    evaluation = evaluate()
    values = evaluation.values
    run.monitor.show(progress.step, evaluation)
    progress.evaluated_step = progress.step
    best = math.inf if progress.best_loss is None else progress.best_loss
    if keep_best and values["eval/loss"] < best:
        progress.best_loss = values["eval/loss"]
        run.export(run.folder / "best")
    return values


def _keep_snapshot(run: Run, step: int) -> None:
    folder = run.folder / "snapshots" / f"step_{step:08d}"
    if not distributed.on_main(folder.exists):  # a resumed run makes the same weights again
        run.export(folder)


def _advance(
    engine: Engine,
    objective: Objective,
    plan: BatchPlan,
    options: OptimizationConfig,
    progress: Progress,
    run: Run,
) -> bool:
    """Makes and records the next step; returns whether a rank wants to stop."""
    number = progress.step + 1
    rate = learning_rate(number, plan.num_steps, options)
    values, faulty, stopping = train_step(engine, objective, plan.step(number), options, rate, run)
    progress.step, progress.num_tokens = number, progress.num_tokens + int(values["num_tokens"])
    values["num_tokens"] = progress.num_tokens
    if faulty is None:
        progress.skipped_in_a_row = 0
    else:
        progress.skipped, progress.skipped_in_a_row = progress.skipped + 1, progress.skipped_in_a_row + 1
        values["skipped_steps"] = progress.skipped
        terminal.warning(f"step {number} is skipped, weights unchanged: {faulty}")
    named = {name if name.startswith("perf/") else f"train/{name}": value for name, value in values.items()}
    named = {name: value for name, value in named.items() if math.isfinite(value)}
    run.monitor.record(number, named)
    run.monitor.advance(named)
    if progress.skipped_in_a_row > options.max_skipped_steps:
        raise RunFailed(
            f"{progress.skipped_in_a_row} steps in a row, up to step {number}, gave no finite gradient "
            f"(train.max_skipped_steps: {options.max_skipped_steps}); the last: {faulty}. The last "
            "checkpoint is as it was; lower train.learning_rate, or look at this data"
        )
    return stopping


def train_step(
    engine: Engine, objective: Objective, step: Step, options: OptimizationConfig, rate: float, run: Run
) -> tuple[dict[str, float], str | None, bool]:
    """One optimizer step over all ranks.

    Returns:
        Its metrics, equal on all ranks; why its update was skipped, or None; and whether a rank has been
        asked to stop.
    """
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
    sums, waited, tokens, losses = MetricSums(), 0.0, np.zeros(3), list[Tensor]()
    batches, forward = prefetch(map(build, micro_batches)), Stopwatch()
    for index in range(len(micro_batches)):
        run.watchdog.progress(f"step {step.number}, micro-batch {index + 1} of {len(micro_batches)}")
        fetching = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - fetching
        tokens += batch.num_real_tokens, batch.num_row_tokens, batch.input_ids.numel()
        last = index == len(micro_batches) - 1
        with forward.running():
            logps = engine.score(batch, last=last, per_token=objective.per_token)
        loss = objective.loss(logps, batch, sums)
        engine.accumulate(loss / count, last=last)
        losses.append(loss.detach())
    norm = engine.update(rate)
    metrics = sums.means()
    own = np.zeros(distributed.world_size())
    own[distributed.rank()] = forward.seconds()  # the update has waited for the device
    counts = np.concatenate([tokens, [run.stop.requested], own])
    real, in_rows, padded, stopping, *rank_seconds = distributed.sum_over_ranks(counts)
    faulty = None if math.isfinite(norm) else _faulty_groups(step, micro_batches, losses, run.describe)
    loads = [sizes.work[np.concatenate(own).astype(int)].sum() for own in shares]
    seconds = time.perf_counter() - started
    values = {
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
        "perf/rank_time_excess": float(np.max(rank_seconds) / np.mean(rank_seconds) - 1),
        "perf/slowest_rank": float(np.argmax(rank_seconds)),
        "perf/peak_memory_gb": peak_memory_bytes() / 1e9,
    }
    if run.group_flops is not None:
        reached = float(run.group_flops[step.groups].sum()) / seconds / distributed.world_size()
        values["perf/tflops_per_device"] = reached / 1e12
        if run.peak_flops is not None:
            values["perf/mfu"] = reached / run.peak_flops
    return values, faulty, bool(stopping)


def _faulty_groups(
    step: Step, micro_batches: list[list[int]], losses: list[Tensor], describe: Callable[[list[int]], str]
) -> str:
    """Whose loss is not finite, over all ranks; where every loss is, it may be any of the step's."""
    finite = torch.stack(losses).isfinite().tolist()
    own = [
        int(step.groups[position])
        for positions, fine in zip(micro_batches, finite, strict=True)
        for position in positions
        if not fine
    ]
    by_rank = distributed.gather_objects(own)
    found = sorted(group for groups in by_rank for group in groups)
    if found:
        ranks = ", ".join(str(rank) for rank, groups in enumerate(by_rank) if groups)
        return f"the loss is not finite on rank {ranks} in the micro-batch of {describe(found)}"
    return f"the gradient is not finite, with {describe(sorted(step.groups.tolist()))}"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def peak_memory_bytes() -> int:
    """Most memory this process has held: the GPU's allocations, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
