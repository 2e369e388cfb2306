"""Fills the reference cache: the missing sequences only, in batches that do not depend on the number of
ranks.

Also the other end of it: the values of a data set, read from the cache, aligned with its sequences.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from dpo import distributed
from dpo.config import Config
from dpo.data.batches import sequence_batch
from dpo.data.dataset import TokenizedDataset
from dpo.errors import UserError
from dpo.model.load import load_model
from dpo.model.logprobs import SequenceScorer
from dpo.records import KEY_BYTES, TokenIds
from dpo.reference.identity import reference_model
from dpo.reference.store import ReferenceStore


@dataclass(frozen=True, slots=True, kw_only=True)
class PrecomputeResult:
    """What one call did, over all ranks."""

    hits: int
    """Different sequences that were in the cache already."""
    misses: int
    """Different sequences that were computed."""
    seconds: float
    """Time of the forward passes."""


def precompute(
    config: Config, datasets: Sequence[TokenizedDataset], store: ReferenceStore
) -> PrecomputeResult:
    """Computes every sequence of `datasets` that the cache lacks; loads no model if it lacks none.

    Args:
        config: Reference model, batch budget and flush interval.
        datasets: The data sets whose sequences are wanted.
        store: The cache of that model.
    """
    if distributed.is_main():
        store.create()
    distributed.barrier()
    keys, where = _unique_sequences(datasets)
    found = store.load().find(keys)
    missing = np.flatnonzero(found < 0)
    distributed.barrier()  # nobody appends before everybody has seen the same gaps
    seconds = 0.0
    if len(missing):
        started = time.monotonic()
        batches = _plan([where[index] for index in missing], config.reference.max_tokens_per_batch)
        _compute(config, datasets, batches, len(missing), store)
        distributed.barrier()
        seconds = time.monotonic() - started
    return PrecomputeResult(hits=len(keys) - len(missing), misses=len(missing), seconds=seconds)


def reference_logps(
    dataset: TokenizedDataset, store: ReferenceStore, command: str
) -> npt.NDArray[np.float64]:
    """(S,) reference log-probs in nats of all sequences of a data set, from the cache alone.

    Args:
        dataset: The data set.
        store: The cache of the reference model.
        command: What a person runs to fill the cache, for the message.

    Raises:
        UserError: The cache lacks a sequence, or has it with another length.
    """
    table = store.load()
    rows = table.find(dataset.keys)
    if (rows < 0).any():
        raise UserError(
            f"{store.path}: the cache lacks {int((rows < 0).sum())} of the {len(rows)} sequences of "
            f"this data; training never computes a reference. Run: {command}"
        )
    lengths = np.diff(dataset.segment_offsets)
    completions = np.delete(lengths, dataset.group_segments[:-1])
    if (table.num_tokens[rows] != completions).any():
        raise UserError(
            f"{store.path}: rows with another number of tokens than the data; delete it and run: {command}"
        )
    return table.logps[rows]


Place = tuple[int, int, int, int]  # tokens, index of the data set, of the group, of the completion


def _unique_sequences(datasets: Sequence[TokenizedDataset]) -> tuple[npt.NDArray[np.void], list[Place]]:
    """Every different sequence once: (U,) keys, and where to find its ids."""
    all_keys = np.concatenate([dataset.keys for dataset in datasets])
    _, first = np.unique(all_keys.view(f"S{KEY_BYTES}"), return_index=True)
    starts = np.cumsum([0, *(len(dataset.keys) for dataset in datasets)])
    places = []
    for sequence in first:
        number = int(np.searchsorted(starts, sequence, side="right")) - 1
        dataset, local = datasets[number], int(sequence - starts[number])
        group = int(np.searchsorted(dataset.first_sequence, local, side="right")) - 1
        completion = local - int(dataset.first_sequence[group])
        segment = int(dataset.group_segments[group])
        offsets = dataset.segment_offsets
        prompt = int(offsets[segment + 1] - offsets[segment])
        tokens = prompt + int(offsets[segment + completion + 2] - offsets[segment + completion + 1])
        places.append((tokens, number, group, completion))
    return all_keys[first], places


def _plan(places: list[Place], budget: int) -> list[list[Place]]:
    """Batches of similar length, the longest first; the number of ranks does not enter."""
    batches: list[list[Place]] = []
    for place in sorted(places, reverse=True):
        if batches and (len(batches[-1]) + 1) * batches[-1][0][0] <= budget:
            batches[-1].append(place)
        else:
            batches.append([place])
    return batches


def _compute(
    config: Config,
    datasets: Sequence[TokenizedDataset],
    batches: list[list[Place]],
    num_sequences: int,
    store: ReferenceStore,
) -> None:
    """This rank's batches, every world_size-th: sorted by length, they are equal work to within one batch."""
    model = reference_model(config)
    scorer = SequenceScorer(load_model(model)).to(distributed.device())
    bar = tqdm(
        total=num_sequences,
        desc=f"reference log-probs ({distributed.world_size()} ranks)",
        unit=" seq",
        disable=not distributed.is_main(),
        dynamic_ncols=True,
    )
    waiting: list[tuple[npt.NDArray[np.void], npt.NDArray[np.float64], npt.NDArray[np.int32]]] = []
    flushed = time.monotonic()
    for batch in distributed.share_of(batches):
        sequences = [_sequence(datasets[number], group, completion) for _, number, group, completion in batch]
        keys = np.array([datasets[n].keys[datasets[n].first_sequence[g] + c] for _, n, g, c in batch])
        with torch.inference_mode():
            logps = scorer(sequence_batch(sequences).to(distributed.device()))
        lengths = np.array([len(completion) for _, completion in sequences], dtype=np.int32)
        waiting.append((keys, logps.cpu().numpy(), lengths))
        if time.monotonic() - flushed > config.reference.flush_every_seconds:
            store.append(*(np.concatenate(column) for column in zip(*waiting, strict=True)))
            waiting, flushed = [], time.monotonic()
        # The other ranks hold equal shares, so this rank's pace is the whole's.
        bar.update(min(len(batch) * distributed.world_size(), num_sequences - bar.n))
    if waiting:
        store.append(*(np.concatenate(column) for column in zip(*waiting, strict=True)))
    bar.update(num_sequences - bar.n)
    bar.close()


def _sequence(dataset: TokenizedDataset, group: int, completion: int) -> tuple[TokenIds, TokenIds]:
    tokenized = dataset[group]
    return tokenized.prompt, tokenized.completions[completion]
