"""The training loop, for preferences and for next tokens: score, loss, backward, update, record.

What differs between the two is an `Objective`. The plan fixes the steps without the world size; this rank
takes its share, and every sum is divided by the count of the whole step, so that the gradient is that of one
big batch.
"""

import math
import resource
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from dpo import distributed, terminal
from dpo.config import OptimizationConfig
from dpo.data.prefetch import prefetch
from dpo.engine.schedule import learning_rate
from dpo.engine.scoring import token_budget
from dpo.errors import RunFailed, StoppedBySignal
from dpo.guards.signals import StopRequestedError
from dpo.tracking.metrics import MetricSums
from dpo.train.checkpoint import Progress, begin_checkpoint
from dpo.train.micro_batches import MicroBatch, micro_batches
from dpo.train.passes import Done, Timed, cached_passes, direct_passes, token_counts, uses_cached_gradient
from dpo.train.routing import routing_metrics
from dpo.train.session import Session


@dataclass(frozen=True, slots=True, kw_only=True)
class DueActions:
    """What is to be done between two steps, in this order."""

    evaluate: bool
    save_checkpoint: bool
    keep_snapshot: bool
    finish: bool
    """All steps are done."""
    move_reference: bool
    """Before the next step."""


def due_actions(
    progress: Progress, options: OptimizationConfig, num_steps: int, *, move_every: int = 0
) -> DueActions:
    """What is due after the steps that are done. Pure.

    Args:
        progress: How far the run is.
        options: How often to evaluate and save.
        num_steps: Optimizer steps of the run.
        move_every: How often the reference moves, in steps; 0: never.
    """
    step, last = progress.step, progress.step == num_steps

    def regular(every: int) -> bool:
        return step > 0 and every > 0 and step % every == 0

    # Weights that stopped giving finite numbers must not replace the last good checkpoint.
    finite = last or not progress.skipped_in_a_row
    return DueActions(
        evaluate=progress.evaluated_step < step and (step == 0 or last or regular(options.evaluate_every)),
        keep_snapshot=regular(options.snapshot_every),
        save_checkpoint=step > 0
        and options.checkpoint_every > 0
        and (last or regular(options.checkpoint_every))
        and finite,
        finish=last,
        move_reference=regular(move_every) and progress.reference_step < step and not last,
    )


def train(session: Session) -> dict[str, float]:
    """Runs the plan from where the session's progress stands, and returns the last evaluation.

    Raises:
        StoppedBySignal: A rank was asked to stop; a checkpoint of the last step is written.
        RunFailed: Too many steps in a row had a number that is not finite.
        UserError: A checkpoint could not be written: the one before the last step, too.
    """
    progress, saved, stopping = session.progress, session.progress.step, False
    move_every = session.moving_reference.options.update_every if session.moving_reference else 0
    session.guard.stop.wait_for_step()
    batches = batches_of(session)
    try:
        while True:
            due = due_actions(progress, session.options, session.plan.num_steps, move_every=move_every)
            if due.evaluate and session.evaluate and not stopping:
                stopping = _stopped_in(partial(_evaluate, session))
            if saved < progress.step and (stopping or due.save_checkpoint):
                saved = _save(session)
            if stopping:
                session.finish_checkpoint()
                _stop(session, saved)
            _export(session, snapshot=due.keep_snapshot)  # what fails here has its checkpoint
            if due.finish:
                session.finish_checkpoint()
                return session.evaluated
            if due.move_reference:
                batches.close()  # the one that was built ahead has values of the old reference
                stopping = _stopped_in(session.move_reference)
                batches = batches_of(session)
            stopping = stopping or _advance(session, batches)
    finally:
        batches.close()


def train_step(
    session: Session, batches: Iterator[MicroBatch], rate: float
) -> tuple[dict[str, float], str | None, bool]:
    """One optimizer step over all ranks.

    Args:
        session: Its engine and objective.
        batches: This rank's micro-batches, from this step's first one on.
        rate: The learning rate.

    Returns:
        Its metrics, equal on all ranks; why its update was skipped, or None; and whether a rank has been
        asked to stop.
    """
    started, timed, sums = time.perf_counter(), Timed(), MetricSums()
    passes = cached_passes if uses_cached_gradient(session) else direct_passes
    done = passes(session, batches, sums, timed)
    norm = session.engine.update(rate)
    own = {f"seconds/{distributed.rank()}": timed.forward.seconds()}  # the update has waited for the device
    seconds = {f"seconds/{rank}": 0.0 for rank in range(distributed.world_size())} | own
    flags = {
        "stopping": float(session.guard.stop.requested),
        "unwritten": float(session.pending is not None and not session.pending.written),
    }
    metrics, totals = sums.reduce(**token_counts(done), **flags, **seconds)
    if not totals["unwritten"]:
        session.finish_checkpoint()
    session.progress.loss_sums = session.objective.observe(totals)
    first = done[0].micro
    faulty = None if math.isfinite(norm) else _faulty_groups(session, done)
    took = time.perf_counter() - started
    values = {
        **metrics,
        "grad_norm": norm,
        "learning_rate": rate,
        "epoch": first.step.epoch,
        "num_tokens": totals["real"],
        "perf/data_wait_fraction": timed.waited / took,
        "perf/rank_imbalance": first.imbalance,
        **routing_metrics([passed.routed for passed in done], session.engine.routers.num_experts),
        **_throughput(session, totals, first, took),
        **_balance(np.array([totals[name] for name in seconds])),
    }
    return values, faulty, bool(totals["stopping"])


def batches_of(session: Session) -> Generator[MicroBatch, None, None]:
    """This rank's micro-batches of all steps to come, built one ahead."""
    return prefetch(
        micro_batches(
            session.objective,
            session.plan,
            first_step=session.progress.step + 1,
            layout=session.engine.layout,
            windows=session.engine.windows,
            device=session.engine.device,
            budget=token_budget(session.options.max_tokens_per_micro_batch),
            cached=uses_cached_gradient(session),
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
    )


def _stopped_in(work: Callable[[], None]) -> bool:
    """Does the work; returns whether a rank has been asked to stop, so that it is not done."""
    try:
        work()
    except StopRequestedError:
        return True
    return False


def _evaluate(session: Session) -> None:
    assert session.evaluate is not None
    progress, evaluation = session.progress, session.evaluate(session)
    session.evaluated = evaluation.values | evaluation.counts
    session.monitor.show(progress.step, evaluation)
    progress.evaluated_step = progress.step
    best = math.inf if progress.best_loss is None else progress.best_loss
    if session.options.keep_best and evaluation.values["eval/loss"] < best:
        progress.best_loss, progress.best_step = evaluation.values["eval/loss"], progress.step


def _export(session: Session, *, snapshot: bool) -> None:
    """Writes the models of this step: also after a resume, since the run may have died before it did."""
    step = session.progress.step
    best = session.options.keep_best and session.progress.best_step == step
    target = session.folder.model(step)
    # a resumed run makes the same weights again
    wanted = snapshot and not distributed.on_main(target.exists)
    if best or wanted:
        session.finish_checkpoint()
    if best:
        session.export(session.folder.best)
    if wanted:
        session.export(target)


def _save(session: Session) -> int:
    """Writes a checkpoint, or begins to, and returns its step."""
    session.finish_checkpoint()
    session.monitor.sync()
    session.pending = begin_checkpoint(
        session.engine,
        session.progress,
        session.folder,
        session.options.keep_last,
        session.fingerprints,
        in_background=session.saves_in_background,
    )
    if not session.saves_in_background:
        session.finish_checkpoint()
    return session.progress.step


def _stop(session: Session, saved: int) -> None:
    session.guard.stop.ignore_more()
    session.finish_mirror()
    distributed.barrier()
    raise StoppedBySignal(
        f"a checkpoint of step {saved} is in {session.folder.path}; run the same command again to resume"
        if saved
        else "no step was made; run the same command again to start"
    )


def _advance(session: Session, batches: Iterator[MicroBatch]) -> bool:
    """Makes and records the next step; returns whether a rank has been asked to stop."""
    progress, options = session.progress, session.options
    number = progress.step + 1
    rate = learning_rate(number, session.plan.num_steps, options)
    values, faulty, stopping = train_step(session, batches, rate)
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
    session.monitor.record(number, named)
    session.monitor.advance(named)
    if progress.skipped_in_a_row > options.max_skipped_steps:
        session.finish_checkpoint()
        raise RunFailed(
            f"{progress.skipped_in_a_row} steps in a row, up to step {number}, gave no finite gradient "
            f"(train.max_skipped_steps: {options.max_skipped_steps}); the last: {faulty}. The last "
            "checkpoint is unchanged; lower train.learning_rate, or look at this data"
        )
    return stopping


def _throughput(
    session: Session, totals: dict[str, float], micro: MicroBatch, took: float
) -> dict[str, float]:
    unit, groups = session.objective.unit, micro.step.groups
    found = {
        "perf/tokens_per_second": totals["real"] / took,
        f"perf/{unit}_per_second": session.objective.num_units(groups) / took,
        "perf/padding_fraction": 1 - totals["real"] / totals["padded"],
        "perf/shared_prefix_fraction": 1 - totals["real"] / totals["in_rows"],
        "perf/peak_memory_gb": peak_memory_bytes() / 1e9,
    }
    if session.group_flops is not None:
        reached = float(session.group_flops[groups].sum()) / took / distributed.world_size()
        found["perf/tflops_per_device"] = reached / 1e12
        if session.peak_flops is not None:
            found["perf/mfu"] = reached / session.peak_flops
    return found


def _balance(rank_seconds: np.ndarray) -> dict[str, float]:
    """How much longer the slowest rank's forward passes took than the mean, and which rank that is."""
    return {
        "perf/rank_time_excess": float(np.max(rank_seconds) / np.mean(rank_seconds) - 1),
        "perf/slowest_rank": float(np.argmax(rank_seconds)),
    }


def _faulty_groups(session: Session, done: list[Done]) -> str:
    """Which groups' loss is not finite, over all ranks; where every loss is finite, it may be any."""
    finite = torch.stack([passed.loss for passed in done]).isfinite().tolist()
    own = {
        int(group)
        for passed, fine in zip(done, finite, strict=True)
        for group in passed.micro.groups
        if not fine
    }
    by_rank = distributed.gather_objects(own)
    found = sorted(group for groups in by_rank for group in groups)
    if found:
        ranks = ", ".join(str(rank) for rank, groups in enumerate(by_rank) if groups)
        return f"the loss is not finite on rank {ranks} in the micro-batch of {session.describe(found)}"
    groups = sorted(done[0].micro.step.groups.tolist())
    return f"the gradient is not finite, with {session.describe(groups)}"


def peak_memory_bytes() -> int:
    """Most memory this process has held: the GPU's allocations, or resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
