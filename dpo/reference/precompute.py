"""Fills the reference cache: the missing sequences only, each once, in batches that do not depend on the
number of ranks.

Rank 0 finds what is missing and cuts it into batches; the ranks share the batches by work and write shards of
their own as they go, so that a crash loses at most what was computed since the last one.
"""

import heapq
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dpo import distributed
from dpo.config import Config
from dpo.data.batches import sequence_batch
from dpo.data.dataset import TokenizedDataset
from dpo.engine import fits_one_device, frozen_scorer
from dpo.errors import StoppedBySignal, UserError
from dpo.model.logprobs import row_sums
from dpo.reference.identity import reference_model
from dpo.reference.store import ReferenceStore
from dpo.reference.table import Int64s, ReferenceRows, halves, index_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputeResult:
    """What one call did, over all ranks."""

    hits: int
    """Different sequences that were in the cache already."""
    misses: int
    """Different sequences that were computed."""
    seconds: float
    """Time of loading the model and of the forward passes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingPlan:
    """What is to be computed, cut into batches; sequences of all data sets are numbered one after the
    other.
    """

    hits: int
    """Different sequences that the cache has."""
    order: Int64s
    """(M,) missing sequences, each once, the longest first."""
    offsets: Int64s
    """(B + 1,) batch b is order[offsets[b] : offsets[b + 1]]."""
    tokens: Int64s
    """(M,) prompt and completion tokens of the sequences in `order`."""

    def batch(self, number: int) -> Int64s:
        """The sequences of a batch."""
        return self.order[self.offsets[number] : self.offsets[number + 1]]

    def num_tokens(self, number: int) -> int:
        """Their tokens, without padding."""
        return int(self.tokens[self.offsets[number] : self.offsets[number + 1]].sum())

    @property
    def work(self) -> Int64s:
        """(B,) tokens of each batch, padding included."""
        return np.diff(self.offsets) * self.tokens[self.offsets[:-1]]


def precompute(
    config: Config, datasets: Sequence[TokenizedDataset], store: ReferenceStore
) -> PrecomputeResult:
    """Computes every sequence of `datasets` that the cache lacks; loads no model if it lacks none.

    All ranks must call it.

    Args:
        config: Reference model, batch budget, sharding and flush interval.
        datasets: The data sets whose sequences are wanted.
        store: The cache of that model.

    Raises:
        UserError: The cache is damaged or cannot be written, or the model gives values that are not finite.
        StoppedBySignal: SIGINT or SIGTERM, after what was computed has been written.
    """
    plan = distributed.on_main(lambda: _plan(config, datasets, store))
    started = time.monotonic()
    if len(plan.order):
        _compute(config, datasets, plan, store)
        distributed.barrier()
    return PrecomputeResult(
        hits=plan.hits, misses=len(plan.order), seconds=time.monotonic() - started if len(plan.order) else 0.0
    )


def _plan(config: Config, datasets: Sequence[TokenizedDataset], store: ReferenceStore) -> MissingPlan:
    store.create()
    keys = np.concatenate([dataset.keys for dataset in datasets])
    index, unique = index_keys(keys)
    found = store.load(with_tokens=config.reference.store_token_logps).index.find(index.keys)
    missing = unique[found < 0]
    tokens = np.concatenate([dataset.sequence_tokens for dataset in datasets])[missing]
    by_length = np.lexsort((*halves(keys[missing]), -tokens))  # ties by content, not by place
    missing, tokens = missing[by_length], tokens[by_length]
    offsets = batch_offsets(tokens, config.reference.max_tokens_per_batch)
    return MissingPlan(hits=len(unique) - len(missing), order=missing, offsets=offsets, tokens=tokens)


def batch_offsets(tokens: Int64s, budget: int) -> Int64s:
    """Cuts sequences into batches of at most `budget` tokens, padding included; at least one a batch.

    Args:
        tokens: (M,) lengths, descending: the first of a batch is its width.
        budget: Tokens of a batch.

    Returns:
        (B + 1,) where batches start, and the end.
    """
    offsets = [0] if len(tokens) else []
    while offsets and offsets[-1] < len(tokens):
        offsets.append(min(len(tokens), offsets[-1] + max(1, budget // int(tokens[offsets[-1]]))))
    return np.asarray(offsets or [0], dtype=np.int64)


def share_by_work(work: Int64s, world_size: int) -> list[list[int]]:
    """Deals batches so that the ranks finish together: each goes to the rank with the least work so far.

    Args:
        work: (B,) of each batch, in the order of dealing.
        world_size: Number of ranks.
    """
    loads = [(0, rank) for rank in range(world_size)]
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for number, amount in enumerate(work.tolist()):
        load, rank = loads[0]
        shares[rank].append(number)
        heapq.heapreplace(loads, (load + amount, rank))
    return shares


def _compute(
    config: Config, datasets: Sequence[TokenizedDataset], plan: MissingPlan, store: ReferenceStore
) -> None:
    """Scores this rank's batches and writes them."""
    model = reference_model(config)
    sharded = is_sharded(config)
    pending: list[ReferenceRows] = []

    def flush() -> None:
        if pending:
            store.append(ReferenceRows.joined(pending))
            pending.clear()

    done, flushed = distributed.SharedCount("precompute"), time.monotonic()
    try:
        with (
            _one_thread(),
            _stop_on_sigterm(),
            frozen_scorer(model, sharded=sharded) as scorer,
            _bar(plan) as bar,
        ):
            try:
                for number in _my_batches(plan, sharded=sharded):
                    batch = plan.batch(number) if number is not None else np.zeros(0, dtype=np.int64)
                    rows = _score(scorer, datasets, batch, per_token=config.reference.store_token_logps)
                    pending.extend([rows] if len(rows) else [])
                    if time.monotonic() - flushed >= config.reference.flush_every_seconds:
                        flush()
                        flushed = time.monotonic()
                    bar.update(done.add(plan.num_tokens(number) if number is not None else 0) - bar.n)
            finally:
                flush()
            distributed.barrier()
            bar.update(done.add(0) - bar.n)
    except KeyboardInterrupt as signalled:
        raise StoppedBySignal(
            f"{store.path}: what was computed is kept; the same command goes on from there"
        ) from signalled
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"reference.max_tokens_per_batch: {config.reference.max_tokens_per_batch} tokens do not fit "
            "the device's memory; lower it, or set reference.sharding: zero3"
        ) from error


def is_sharded(config: Config) -> bool:
    """Whether the reference is spread over the ranks with ZeRO-3; rank 0 decides for all."""
    if distributed.world_size() == 1:  # nobody to share with
        return False
    if config.reference.sharding == "auto":
        return not distributed.on_main(lambda: fits_one_device(reference_model(config)))
    return config.reference.sharding == "zero3"


def _my_batches(plan: MissingPlan, *, sharded: bool) -> list[int | None]:
    """This rank's batches; with sharded weights in step with the other ranks, None where it has run out."""
    rank, world_size, number = distributed.rank(), distributed.world_size(), len(plan.offsets) - 1
    if not sharded:
        return [*share_by_work(plan.work, world_size)[rank]]
    rounds = -(-number // world_size)
    return [turn if turn < number else None for turn in range(rank, rounds * world_size, world_size)]


def _score(
    scorer: nn.Module, datasets: Sequence[TokenizedDataset], batch: Int64s, *, per_token: bool
) -> ReferenceRows:
    """One forward pass; without sequences an empty one, which the other ranks wait for."""
    places = [_place(datasets, int(sequence)) for sequence in batch]
    rows = sequence_batch([dataset.sequence(index) for dataset, index in places])
    rows = rows.to(distributed.device())
    with torch.inference_mode():
        token_logps = scorer(rows, per_token=True)
        logps = row_sums(token_logps, rows).cpu().numpy()
    if not np.isfinite(logps).all():
        raise UserError(
            f"the reference model gave {int((~np.isfinite(logps)).sum())} of {len(logps)} log-probs that are "
            "not finite; none of this batch was stored. Check its weights, or set model.dtype: float32"
        )
    if not places:
        return ReferenceRows.joined([])
    return ReferenceRows(
        keys=np.array([dataset.keys[index] for dataset, index in places]),
        logps=logps,
        num_tokens=rows.num_tokens.cpu().numpy().astype(np.int32),
        token_logps=token_logps.cpu().numpy() if per_token else None,
    )


def _place(datasets: Sequence[TokenizedDataset], sequence: int) -> tuple[TokenizedDataset, int]:
    """The data set that holds a sequence, and its number there."""
    for dataset in datasets:
        if sequence < len(dataset.keys):
            return dataset, sequence
        sequence -= len(dataset.keys)
    raise IndexError(sequence)


def _bar(plan: MissingPlan) -> "tqdm[NoReturn]":
    """Progress over all ranks. Its unit is tokens, since the longest sequences come first."""
    return tqdm(
        total=int(plan.tokens.sum()),
        desc=f"reference log-probs: {plan.hits} sequences cached, {len(plan.order)} to compute",
        unit=" tokens",
        unit_scale=True,
        disable=not distributed.is_main(),
        dynamic_ncols=True,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """On a CPU the number of threads changes the order of sums, and it follows from the number of ranks: with
    one thread a rank, values do not depend on it.
    """
    threads = torch.get_num_threads()
    if distributed.device().type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """A scheduler's SIGTERM stops as Ctrl-C does."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
