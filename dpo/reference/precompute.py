"""Fills the reference cache: only the missing sequences, each once.

Rank 0 finds what is missing. The ranks share the batches of `dpo.reference.batches` by work, and each writes
shards of its own as it proceeds. A crash loses at most what was computed since a rank's last shard; an error
or a signal loses nothing.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dpo import alive, distributed, terminal
from dpo.config import ModelConfig, ReferenceConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import Int64s, deal
from dpo.data.prefetch import prefetch
from dpo.data.trees import Layout, Tree, TreeBatch, tree_batch
from dpo.engine.frozen import frozen_scorer, is_sharded
from dpo.engine.scoring import bare_scorer, settle_layout, token_budget
from dpo.errors import UserError
from dpo.model.load import DTYPES
from dpo.model.probe_trees import probe_trees
from dpo.model.scorer import sequence_sums
from dpo.reference.batches import MissingPlan, place_of, plan_batches
from dpo.reference.shard_writer import ShardWriter
from dpo.reference.store import ReferenceStore
from dpo.reference.table import Keys, ReferenceRows, halves, index_keys


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputeResult:
    """What one call did, over all ranks."""

    hits: int
    """Distinct sequences that were in the cache already."""
    misses: int
    """Distinct sequences that were computed."""
    seconds: float
    """Time of the forward passes, without loading the model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Missing:
    """What the cache lacks."""

    hits: int
    """Distinct sequences that the cache has."""
    sequences: Int64s
    """(M,) missing sequences, each once, in the order of their keys. The sequences of all data sets are
    numbered consecutively."""


def precompute(
    model: ModelConfig,
    options: ReferenceConfig,
    datasets: Sequence[TokenizedDataset],
    store: ReferenceStore,
) -> PrecomputeResult:
    """Computes every sequence of `datasets` that the cache lacks; loads no model if it lacks none.

    All ranks must call it. If an exception ends it early, what was computed is written first.

    Args:
        model: The reference model.
        options: Batch budget, sharding, flush interval, and whether to store log-probs per token.
        datasets: The data sets whose sequences are wanted.
        store: The cache of that model.

    Raises:
        UserError: The cache is damaged or cannot be written, a batch does not fit the device's memory, or the
            model gives values that are not finite.
    """
    missing = distributed.on_main(
        lambda: find_missing(datasets, store, per_token=options.store_token_logps),
    )
    seconds = 0.0
    if len(missing.sequences):
        seconds = _compute(model, options, datasets, missing, store)
        distributed.barrier()
    return PrecomputeResult(hits=missing.hits, misses=len(missing.sequences), seconds=seconds)


def find_missing(datasets: Sequence[TokenizedDataset], store: ReferenceStore, *, per_token: bool) -> Missing:
    """Joins the data sets with the cache, which it creates if necessary.

    Args:
        datasets: The data sets whose sequences are wanted.
        store: The cache.
        per_token: A row without log-probs per token counts as missing.

    Raises:
        UserError: The cache is damaged or cannot be written.
    """
    store.create()
    keys = np.concatenate([dataset.keys for dataset in datasets])
    index, unique = index_keys(keys)
    found = store.load(with_tokens=per_token).index.find(index.keys)
    missing = unique[found < 0]
    by_content = np.lexsort(halves(keys[missing]))  # not by position: the order of the data does not matter
    return Missing(hits=len(unique) - len(missing), sequences=missing[by_content])


def _compute(
    model: ModelConfig,
    options: ReferenceConfig,
    datasets: Sequence[TokenizedDataset],
    missing: Missing,
    store: ReferenceStore,
) -> float:
    """Scores this rank's batches and writes them; returns the seconds that took, without loading."""
    sharded = is_sharded(options.sharding, model)
    device = distributed.device()  # of this thread: batches are laid out in another one
    done, budget = distributed.SharedCount("precompute"), token_budget(options.max_tokens_per_batch)
    try:
        with _one_thread_on_cpu(device), frozen_scorer(model, sharded=sharded) as scorer:
            probed = settle_layout(scorer, probe_trees(datasets), DTYPES[model.dtype])
            terminal.warning(*probed.notes)
            plan = plan_batches(datasets, missing.sequences, probed.layout, budget)
            mine = _my_batches(plan, sharded=sharded)
            windows = bare_scorer(scorer).windows
            lay_out = partial(_lay_out, datasets, plan, probed.layout, windows, device)
            started = time.monotonic()
            alive.step("reference log-probs")
            with _bar(plan) as bar:
                with ShardWriter(store, options.flush_every_seconds) as unwritten:
                    for number, (batch, keys) in zip(mine, prefetch(map(lay_out, mine)), strict=True):
                        unwritten.add(_score(scorer, batch, keys, per_token=options.store_token_logps))
                        tokens = plan.num_tokens(number) if number is not None else 0
                        bar.update(done.add(tokens) - bar.n)
                distributed.barrier()
                bar.update(done.add(0) - bar.n)
            return time.monotonic() - started
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"reference.max_tokens_per_batch: {budget} tokens do not fit "
            "the device's memory; lower it, or set reference.sharding: zero3"
        ) from error


def _my_batches(plan: MissingPlan, *, sharded: bool) -> list[int | None]:
    """The numbers of this rank's batches. With sharded weights every rank takes part in every forward pass:
    all lists have the same length, with None where a rank has no batch left.
    """
    if sharded:
        return distributed.turns_of(range(plan.num_batches))
    return [*deal(plan.work, distributed.world_size())[distributed.rank()]]


def _lay_out(
    datasets: Sequence[TokenizedDataset],
    plan: MissingPlan,
    layout: Layout,
    windows: Sequence[int | None],
    device: torch.device,
    batch: int | None,
) -> tuple[TreeBatch, Keys]:
    """A batch on `device` and the keys of its sequences; an empty batch where there is no number.

    Runs in the thread of `prefetch`, in which `distributed.device()` is not this rank's.
    """
    trees: list[Tree] = []
    keys: list[np.void] = []
    for sequences in plan.batch(batch) if batch is not None else []:
        places = [place_of(datasets, sequence) for sequence in sequences]
        parts = [datasets[number].sequence(index) for number, index in places]
        trees.append((parts[0][0], [completion for _, completion in parts]))
        keys.extend(datasets[number].keys[index] for number, index in places)
    return tree_batch(trees, layout).to(device, windows), np.array(keys)


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


def _bar(plan: MissingPlan) -> "tqdm[NoReturn]":
    """Progress over all ranks. Its unit is tokens, since the longest sequences come first."""
    total = int(plan.tokens.sum())
    return terminal.bar(total, description="reference log-probs", unit="tokens", unit_scale=True)


@contextmanager
def _one_thread_on_cpu(device: torch.device) -> Iterator[None]:
    """Computes with one thread on a CPU. The number of threads changes the order of sums, and depends on the
    number of ranks; the cached values must not.
    """
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
