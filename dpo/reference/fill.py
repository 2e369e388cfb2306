"""Batches of a cache build -> shards: one forward pass each, by whatever model stands behind a function.

Precompute gives a model that it loads for that; a moving reference gives the policy that is being trained.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dpo import alive, distributed, terminal
from dpo.config import ReferenceConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.prefetch import prefetch
from dpo.data.trees import Layout, Tree, TreeBatch, tree_batch
from dpo.engine.scoring import token_budget
from dpo.errors import UserError
from dpo.model.scorer import sequence_sums
from dpo.reference.batches import MissingPlan, place_of
from dpo.reference.shard_writer import ShardWriter
from dpo.reference.store import ReferenceStore
from dpo.reference.table import Keys, ReferenceRows

TokenScore = Callable[[TreeBatch], Tensor]
"""A batch on this rank's device -> (N,) log-probs in nats of its completion tokens, without gradient."""


def fill(
    score: TokenScore,
    datasets: Sequence[TokenizedDataset],
    plan: MissingPlan,
    batches: Sequence[int | None],
    store: ReferenceStore,
    options: ReferenceConfig,
    *,
    layout: Layout,
    windows: Sequence[int | None],
) -> float:
    """Scores batches and writes their rows. All ranks must call it.

    If an exception ends it early, what was computed is written first.

    Args:
        score: The reference model.
        datasets: The data sets that the plan's sequences are in.
        plan: All batches of the build.
        batches: Numbers of this rank's; None where it must take part and has none left.
        store: The cache.
        options: Flush interval, and whether to store log-probs per token.
        layout: How batches are laid out, as in the plan.
        windows: How far back the model's layers look; see `TreeBatch.to`.

    Returns:
        The seconds that took.

    Raises:
        UserError: The cache cannot be written, or the model gives values that are not finite.
    """
    device = distributed.device()  # of this thread: batches are laid out in another one
    done, started = distributed.SharedCount("precompute"), time.monotonic()
    lay_out = partial(_lay_out, datasets, plan, layout, windows, device)
    alive.step("reference log-probs")
    with _one_thread_on_cpu(device), _bar(plan) as bar:
        with ShardWriter(store, options.flush_every_seconds) as unwritten:
            for number, (batch, keys) in zip(batches, prefetch(map(lay_out, batches)), strict=True):
                unwritten.add(_rows(score, batch, keys, per_token=options.store_token_logps))
                tokens = plan.num_tokens(number) if number is not None else 0
                bar.update(done.add(tokens) - bar.n)
        distributed.barrier()
        bar.update(done.add(0) - bar.n)
    return time.monotonic() - started


@contextmanager
def within_memory(options: ReferenceConfig) -> Iterator[int]:
    """The largest number of tokens in a batch, for a block that computes such batches.

    Raises:
        UserError: One does not fit the device's memory.
    """
    budget = token_budget(options.max_tokens_per_batch)
    try:
        yield budget
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"reference.max_tokens_per_batch: {budget} tokens do not fit "
            "the device's memory; lower it, or set reference.sharding: zero3"
        ) from error


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


def _rows(score: TokenScore, batch: TreeBatch, keys: Keys, *, per_token: bool) -> ReferenceRows:
    """One forward pass."""
    with torch.no_grad():
        token_logps = score(batch)
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
