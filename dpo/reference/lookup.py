"""The other end of the cache: the values of data sets, aligned with their sequences.

Rank 0 reads the cache and joins it with the data, and the others get the arrays: 8 bytes a sequence, so 16
bytes a pair, is all that training holds of the reference.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dpo import distributed
from dpo.data.dataset import TokenizedDataset
from dpo.errors import UserError
from dpo.reference.shards import read_shard
from dpo.reference.store import ReferenceStore
from dpo.reference.table import Int64s, ReferenceTable, index_keys

Float64s = npt.NDArray[np.float64]


def reference_logps(
    datasets: Sequence[TokenizedDataset], store: ReferenceStore, command: str
) -> list[Float64s]:
    """(S,) reference log-probs in nats of all sequences of each data set, from the cache alone.

    All ranks must call it.

    Args:
        datasets: The data sets.
        store: The cache of the reference model.
        command: What a person runs to fill the cache, for the message.

    Raises:
        UserError: The cache lacks a sequence, has it with another length, or is damaged.
    """

    def join() -> list[Float64s]:
        table = store.load()
        return [table.logps[_rows(table, dataset, store, command)] for dataset in datasets]

    return distributed.on_main(join)


def reference_token_logps(
    dataset: TokenizedDataset, store: ReferenceStore, command: str
) -> npt.NDArray[np.float32]:
    """(completion_tokens.sum(),) reference log-probs of every completion token, sequence after sequence.

    All ranks must call it.

    Args:
        dataset: The data set.
        store: The cache of the reference model.
        command: What a person runs to fill the cache, for the message.

    Raises:
        UserError: As `reference_logps`, or rows were stored without reference.store_token_logps.
    """
    return distributed.on_main(lambda: _join_tokens(dataset, store, command))


def _join_tokens(dataset: TokenizedDataset, store: ReferenceStore, command: str) -> npt.NDArray[np.float32]:
    _rows(store.load(with_tokens=True), dataset, store, f"{command} with reference.store_token_logps: true")
    lengths = dataset.completion_tokens
    starts = np.cumsum(lengths) - lengths
    values = np.empty(int(lengths.sum()), dtype=np.float32)

    def fill(shards: list[Path]) -> None:
        for path in reversed(shards):  # so that the oldest copy of a row is written last and stays
            shard = read_shard(path, store.identity.digest, token_logps=True)
            if shard.token_logps is None:
                continue
            index, first = index_keys(shard.keys)
            places = index.find(dataset.keys)
            sequences = np.flatnonzero(places >= 0)
            rows, counts = first[places[sequences]], lengths[sequences]
            shard_starts = np.cumsum(shard.num_tokens) - shard.num_tokens
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            targets = np.repeat(starts[sequences], counts) + within
            values[targets] = shard.token_logps[np.repeat(shard_starts[rows], counts) + within]

    store.read_shards(fill)
    return values


def _rows(table: ReferenceTable, dataset: TokenizedDataset, store: ReferenceStore, command: str) -> Int64s:
    rows = table.index.find(dataset.keys)
    if (rows < 0).any():
        nearest = store.nearest_other() if len(table) == 0 else None
        raise UserError(
            f"{store.path}: the cache lacks {int((rows < 0).sum())} of the {len(rows)} sequences of this data"
            f"{f' ({nearest})' if nearest else ''}; training never computes a reference. Run: {command}"
        )
    if (table.num_tokens[rows] != dataset.completion_tokens).any():
        raise UserError(
            f"{store.path}: rows with another number of tokens than the data; delete it and run: {command}"
        )
    return rows
