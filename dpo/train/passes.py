"""The forward and backward passes of one step on this rank, in two ways that give the same gradient.

Direct: each micro-batch is scored with gradient, its loss is computed, and its backward pass runs.

Cached: all micro-batches are scored, all but the last without gradient; then the loss of the whole step and
its derivative with respect to each log-prob are computed; then each of the others is scored again, and the
backward passes run with that derivative. A preference loss is a function of one number per sequence or token,
so this is exact, for at most a third more compute. Losses may need the whole step, and a piece may be one
completion with its prompt.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dpo import alive
from dpo.model.routers import Routed
from dpo.tracking.metrics import MetricSums
from dpo.train.micro_batches import MicroBatch
from dpo.train.routing import step_balance
from dpo.train.session import Session
from dpo.train.stopwatch import Stopwatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A micro-batch whose backward pass has run."""

    micro: MicroBatch
    loss: Tensor
    """Detached scalar, not finite where the micro-batch's part of the loss is not."""
    routed: Routed
    """What its routers chose, without gradient."""


@dataclass(slots=True, kw_only=True)
class Timed:
    """Where this rank's time went."""

    forward: Stopwatch = field(default_factory=Stopwatch)
    waited: float = 0.0
    """Seconds spent waiting for batches."""


def uses_cached_gradient(session: Session) -> bool:
    """Whether steps compute their gradient the cached way."""
    chosen = session.options.backward
    whole = session.objective.needs_whole_step or session.model.router_aux_loss_weight > 0
    return whole if chosen == "auto" else chosen == "cached"


def direct_passes(
    session: Session, batches: Iterator[MicroBatch], sums: MetricSums, timed: Timed
) -> list[Done]:
    """One forward and one backward pass per micro-batch.

    Args:
        session: Its engine and objective.
        batches: This rank's micro-batches, from this step's first one on.
        sums: Receives the metrics.
        timed: Receives the times.
    """
    engine, objective, done = session.engine, session.objective, list[Done]()
    for micro in _step(session, batches, timed):
        logps, routed = _score(session, micro, timed)
        loss = objective.loss(logps, micro.batch, sums)
        engine.accumulate(loss / micro.count, last=micro.last)
        done.append(Done(micro=micro, loss=loss.detach(), routed=routed))
    return done


def cached_passes(
    session: Session, batches: Iterator[MicroBatch], sums: MetricSums, timed: Timed
) -> list[Done]:
    """All micro-batches but the last without gradient, the step's loss, then the backward passes.

    The last one is scored with gradient at once, and its backward pass is the first: it needs no second
    forward pass, and a step of one micro-batch costs no more than the direct way. See `direct_passes` for the
    arguments.
    """
    engine, objective = session.engine, session.objective
    *before, final = _step(session, batches, timed)
    pieces = [final, *before]
    assert final.whole is not None
    with torch.no_grad():
        first = [_score(session, piece, timed) for piece in before]
    graph = [_score(session, final, timed)]
    scored, routed = zip(*first, *graph, strict=True)
    lengths = [_num_values(piece, per_token=objective.per_token) for piece in (*before, final)]
    values = [part.detach()[:length] for part, length in zip(scored, lengths, strict=True)]
    # a rank without work scores a sequence that does not count
    logps = (torch.cat(values) if sum(lengths) else scored[-1].detach()).requires_grad_()
    loss = objective.loss(logps, final.whole, sums)
    (slopes,) = torch.autograd.grad(loss / final.count, logps)
    valid = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
    weight = session.model.router_aux_loss_weight
    balance = step_balance(routed) if weight else None
    del scored, routed  # a piece's graph is freed by its backward pass
    *earlier, latest = slopes[: sum(lengths)].split(lengths)
    done = list[Done]()
    for number, (piece, own) in enumerate(zip(pieces, [latest, *earlier], strict=True)):
        last = number == len(before)
        alive.step(f"step {piece.step.number}, backward pass {number + 1} of {piece.of}")
        again, chosen = graph.pop() if graph else _score(session, piece, timed)
        part = (again[: len(own)] * own).sum() * valid + 0.0 * again.sum()
        if balance is not None:
            part = part + weight * balance.part(chosen)
        engine.accumulate(part, last=last)
        done.append(Done(micro=piece, loss=own.sum(), routed=chosen.detached()))
    return done


def token_counts(done: list[Done]) -> dict[str, float]:
    """Tokens of this rank's part of a step: `real` without padding, `in_rows` and `padded` as laid out."""
    whole = done[0].micro.whole
    batches = [passed.micro.batch for passed in done] if whole is None else [whole]
    return {
        "real": float(sum(batch.num_real_tokens for batch in batches)),
        "in_rows": float(sum(batch.num_row_tokens for batch in batches)),
        "padded": float(sum(passed.micro.batch.input_ids.numel() for passed in done)),
    }


def _score(session: Session, micro: MicroBatch, timed: Timed) -> tuple[Tensor, Routed]:
    """A micro-batch's log-probs, as the objective takes them, and what its routers chose."""
    engine, objective = session.engine, session.objective
    with timed.forward.running(), engine.routers.watching(micro.batch) as routed:
        logps = engine.score(micro.batch, per_token=objective.per_token, aligned=objective.aligned)
    return logps, routed


def _step(session: Session, batches: Iterator[MicroBatch], timed: Timed) -> Iterator[MicroBatch]:
    """The micro-batches of one step."""
    last = False
    while not last:
        fetching = time.perf_counter()
        micro = next(batches)
        timed.waited += time.perf_counter() - fetching
        alive.step(f"step {micro.step.number}, micro-batch {micro.index + 1} of {micro.of}")
        last = micro.last
        yield micro


def _num_values(piece: MicroBatch, *, per_token: bool) -> int:
    """Log-probs of a piece's own sequences: an empty one scores a sequence that does not count."""
    if not len(piece.groups):
        return 0
    return len(piece.batch.targets if per_token else piece.batch.num_tokens)
