"""Fills the reference cache: only the missing sequences, each once.

Rank 0 finds what is missing. The ranks share the batches of `dpo.reference.batches` by work, and each writes
shards of its own as it proceeds. A crash loses at most what was computed since a rank's last shard; an error
or a signal loses nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo import distributed, terminal
from dpo.config import ModelConfig, ReferenceConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import Int64s, deal
from dpo.data.trees import TreeBatch
from dpo.engine.frozen import frozen_scorer, is_sharded
from dpo.engine.scoring import bare_scorer, settle_layout
from dpo.model.load import DTYPES
from dpo.model.probe_trees import probe_trees
from dpo.reference.batches import MissingPlan, plan_batches
from dpo.reference.fill import fill, within_memory
from dpo.reference.store import ReferenceStore
from dpo.reference.table import halves, index_keys


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
    with within_memory(options) as budget, frozen_scorer(model, sharded=sharded) as scorer:
        probed = settle_layout(scorer, probe_trees(datasets), DTYPES[model.dtype])
        terminal.warning(*probed.notes)
        plan = plan_batches(datasets, missing.sequences, probed.layout, budget)

        def score(batch: TreeBatch) -> Tensor:
            with torch.inference_mode():
                logps: Tensor = scorer(batch, per_token=True)
                return logps

        return fill(
            score,
            datasets,
            plan,
            _my_batches(plan, sharded=sharded),
            store,
            options,
            layout=probed.layout,
            windows=bare_scorer(scorer).windows,
        )


def _my_batches(plan: MissingPlan, *, sharded: bool) -> list[int | None]:
    """The numbers of this rank's batches. With sharded weights every rank takes part in every forward pass:
    all lists have the same length, with None where a rank has no batch left.
    """
    if sharded:
        return distributed.turns_of(range(plan.num_batches))
    return [*deal(plan.work, distributed.world_size())[distributed.rank()]]
