"""Fills the reference cache: the missing sequences only, each once, in batches that do not depend on the
number of ranks.

Rank 0 finds what is missing and cuts it into batches; the ranks share the batches by work and write shards of
their own as they go, so that a crash loses at most what was computed since the last one.
"""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import FrameType
from typing import NoReturn

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dpo import distributed, terminal
from dpo.config import Config
from dpo.data.dataset import TokenizedDataset, longest_tree
from dpo.data.plan import Int64s, deal
from dpo.data.prefetch import prefetch
from dpo.data.trees import Layout, Tree, TreeBatch, tree_batch
from dpo.engine.frozen import frozen_scorer, is_sharded
from dpo.engine.scoring import settle_layout, token_budget
from dpo.errors import StoppedBySignal, UserError
from dpo.model.load import DTYPES
from dpo.model.scorer import sequence_sums
from dpo.reference.identity import reference_model
from dpo.reference.store import ReferenceStore
from dpo.reference.table import Keys, ReferenceRows, halves, index_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputeResult:
    """What one call did, over all ranks."""

    hits: int
    """Different sequences that were in the cache already."""
    misses: int
    """Different sequences that were computed."""
    seconds: float
    """Time of the forward passes, without loading the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """What the cache lacks; sequences of all data sets are numbered one after the other."""

    hits: int
    """Different sequences that the cache has."""
    sequences: Int64s
    """(M,) missing sequences, each once, in the order of their keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MissingPlan:
    """The missing sequences in K trees, and the trees in B batches, the largest first."""

    order: Int64s
    """(M,) missing sequences, tree after tree."""
    trees: Int64s
    """(K + 1,) tree t holds order[trees[t] : trees[t + 1]]."""
    offsets: Int64s
    """(B + 1,) batch b holds the trees offsets[b] to offsets[b + 1]."""
    tokens: Int64s
    """(K,) tokens of each tree."""
    padded: bool
    """Whether the trees of a batch are padded to its largest."""

    def batch(self, number: int) -> list[list[int]]:
        """The sequences of each tree of a batch."""
        cuts = self.trees[self.offsets[number] : self.offsets[number + 1] + 1]
        return [self.order[start:end].tolist() for start, end in pairwise(cuts)]

    def num_tokens(self, number: int) -> int:
        """Tokens of a batch, without padding."""
        return int(self.tokens[self.offsets[number] : self.offsets[number + 1]].sum())

    @property
    def work(self) -> Int64s:
        """(B,) tokens of each batch, padding included."""
        if self.padded:
            return np.diff(self.offsets) * self.tokens[self.offsets[:-1]]
        return np.add.reduceat(self.tokens, self.offsets[:-1])


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
    missing = distributed.on_main(lambda: _missing(config, datasets, store))
    seconds = 0.0
    if len(missing.sequences):
        seconds = _compute(config, datasets, missing, store)
        distributed.barrier()
    return PrecomputeResult(hits=missing.hits, misses=len(missing.sequences), seconds=seconds)


def _missing(config: Config, datasets: Sequence[TokenizedDataset], store: ReferenceStore) -> Missing:
    store.create()
    keys = np.concatenate([dataset.keys for dataset in datasets])
    index, unique = index_keys(keys)
    found = store.load(with_tokens=config.reference.store_token_logps).index.find(index.keys)
    missing = unique[found < 0]
    by_content = np.lexsort(halves(keys[missing]))  # not by place: the order of the data does not matter
    return Missing(hits=len(unique) - len(missing), sequences=missing[by_content])


def plan_batches(
    datasets: Sequence[TokenizedDataset], sequences: Int64s, layout: Layout, budget: int
) -> MissingPlan:
    """Gathers the sequences of one group into a tree, and cuts the trees into batches; blind to the ranks.

    Args:
        datasets: Where the sequences are.
        sequences: (M,) at least one, in an order that decides between trees of equal size.
        layout: How batches are laid out; `rows` makes every sequence a tree of its own.
        budget: Most tokens of a batch, padding included; a larger tree is a batch of its own.
    """
    total = np.concatenate([dataset.sequence_tokens for dataset in datasets])[sequences]
    completion = np.concatenate([dataset.completion_tokens for dataset in datasets])[sequences]
    if layout == "rows":
        groups = np.arange(len(sequences))
    else:
        sizes = np.concatenate([dataset.sequences_per_group for dataset in datasets])
        groups = np.searchsorted(np.cumsum(sizes), sequences, side="right")
    by_group = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[by_group], prepend=-1))
    tokens = (total - completion)[by_group[starts]] + np.add.reduceat(completion[by_group], starts)
    largest_first = np.lexsort((by_group[starts], -tokens))
    place = np.empty_like(largest_first)
    place[largest_first] = np.arange(len(place))
    counts = np.diff(starts, append=len(by_group))
    order = by_group[np.lexsort((by_group, np.repeat(place, counts)))]
    tokens, padded = tokens[largest_first], layout in ("trees", "rows")
    return MissingPlan(
        order=sequences[order],
        trees=np.concatenate([[0], np.cumsum(counts[largest_first])]),
        offsets=batch_offsets(tokens, budget, padded=padded),
        tokens=tokens,
        padded=padded,
    )


def batch_offsets(tokens: Int64s, budget: int, *, padded: bool) -> Int64s:
    """Cuts trees into batches of at most `budget` tokens; at least one a batch.

    Args:
        tokens: (K,) of each tree, descending: the first of a batch is its width.
        budget: Tokens of a batch.
        padded: Count every tree of a batch as wide as its first.

    Returns:
        (B + 1,) where batches start, and the end.
    """
    ends = np.cumsum(tokens)
    offsets = [0]
    while (start := offsets[-1]) < len(tokens):
        if padded:
            end = start + budget // int(tokens[start])
        else:
            end = int(np.searchsorted(ends, int(ends[start] - tokens[start]) + budget, side="right"))
        offsets.append(min(len(tokens), max(start + 1, end)))
    return np.asarray(offsets, dtype=np.int64)


def _compute(
    config: Config, datasets: Sequence[TokenizedDataset], missing: Missing, store: ReferenceStore
) -> float:
    """Scores this rank's batches and writes them; returns the seconds that took, without loading."""
    model = reference_model(config)
    sharded = is_sharded(config.reference.sharding, model)
    pending: list[ReferenceRows] = []

    def flush() -> None:
        if pending:
            store.append(ReferenceRows.joined(pending))
            pending.clear()

    done, budget = distributed.SharedCount("precompute"), token_budget(config.reference.max_tokens_per_batch)
    try:
        with _one_thread(), _stop_on_sigterm(), frozen_scorer(model, sharded=sharded) as scorer:
            probed = settle_layout(scorer, longest_tree(datasets), DTYPES[model.dtype])
            terminal.warning(*probed.notes)
            plan = plan_batches(datasets, missing.sequences, probed.layout, budget)
            started = flushed = time.monotonic()
            with _bar(plan, missing) as bar:
                try:
                    mine = _my_batches(plan, sharded=sharded)
                    batches = prefetch(map(partial(_lay_out, datasets, plan, probed.layout), mine))
                    for number, (batch, keys) in zip(mine, batches, strict=True):
                        rows = _score(scorer, batch, keys, per_token=config.reference.store_token_logps)
                        pending.extend([rows] if len(rows) else [])
                        if time.monotonic() - flushed >= config.reference.flush_every_seconds:
                            flush()
                            flushed = time.monotonic()
                        tokens = plan.num_tokens(number) if number is not None else 0
                        bar.update(done.add(tokens) - bar.n)
                finally:
                    flush()
                distributed.barrier()
                bar.update(done.add(0) - bar.n)
            return time.monotonic() - started
    except KeyboardInterrupt as signalled:
        raise StoppedBySignal(
            f"{store.path}: what was computed is kept; the same command goes on from there"
        ) from signalled
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"reference.max_tokens_per_batch: {budget} tokens do not fit "
            "the device's memory; lower it, or set reference.sharding: zero3"
        ) from error


def _my_batches(plan: MissingPlan, *, sharded: bool) -> list[int | None]:
    """This rank's batches; with sharded weights in step with the other ranks, None where it has run out."""
    if sharded:
        return distributed.turns_of(range(len(plan.offsets) - 1))
    return [*deal(plan.work, distributed.world_size())[distributed.rank()]]


def _lay_out(
    datasets: Sequence[TokenizedDataset], plan: MissingPlan, layout: Layout, number: int | None
) -> tuple[TreeBatch, Keys]:
    """A batch on this rank's device and the keys of its sequences; without a number an empty one, which the
    other ranks wait for.
    """
    trees: list[Tree] = []
    keys: list[np.void] = []
    for sequences in plan.batch(number) if number is not None else []:
        places = [_place(datasets, sequence) for sequence in sequences]
        parts = [dataset.sequence(index) for dataset, index in places]
        trees.append((parts[0][0], [completion for _, completion in parts]))
        keys.extend(dataset.keys[index] for dataset, index in places)
    return tree_batch(trees, layout).to(distributed.device()), np.array(keys)


def _score(scorer: nn.Module, batch: TreeBatch, keys: Keys, *, per_token: bool) -> ReferenceRows:
    """One forward pass."""
    with torch.inference_mode():
        token_logps = scorer(batch, per_token=True)
        logps = sequence_sums(token_logps, batch).cpu().numpy()
    if not np.isfinite(logps).all():
        raise UserError(
            f"the reference model gave {int((~np.isfinite(logps)).sum())} of {len(logps)} log-probs that are "
            "not finite; none of this batch was stored. Check its weights, or set model.dtype: float32"
        )
    if not len(keys):
        return ReferenceRows.joined([])
    return ReferenceRows(
        keys=keys,
        logps=logps,
        num_tokens=batch.num_tokens.cpu().numpy().astype(np.int32),
        token_logps=token_logps.cpu().numpy() if per_token else None,
    )


def _place(datasets: Sequence[TokenizedDataset], sequence: int) -> tuple[TokenizedDataset, int]:
    """The data set that holds a sequence, and its number there."""
    for dataset in datasets:
        if sequence < len(dataset.keys):
            return dataset, sequence
        sequence -= len(dataset.keys)
    raise IndexError(sequence)


def _bar(plan: MissingPlan, missing: Missing) -> "tqdm[NoReturn]":
    """Progress over all ranks. Its unit is tokens, since the longest sequences come first."""
    return terminal.bar(
        int(plan.tokens.sum()),
        description=f"reference log-probs: {missing.hits} sequences cached, "
        f"{len(missing.sequences)} to compute",
        unit="tokens",
        unit_scale=True,
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
