"""The other end of the cache: the values of data sets, aligned with their sequences.

Rank 0 reads the cache and joins it with the data, and the others get the arrays: 8 bytes a sequence, so 16
bytes a pair, is all that training holds of the reference.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpo import distributed, terminal
from dpo.config import Config
from dpo.data.dataset import TokenizedDataset
from dpo.data.trees import TreeBatch
from dpo.engine.frozen import frozen_scorer, is_sharded
from dpo.errors import UserError
from dpo.reference.audit import audit, check_rows, record_rows
from dpo.reference.identity import policy_is_reference, reference_identity, reference_model
from dpo.reference.shards import read_shard
from dpo.reference.store import ReferenceStore
from dpo.reference.table import Float64s, Int64s, ReferenceTable, index_keys


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


Values = npt.NDArray[np.float64] | npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceUse:
    """The cache as a run sees it."""

    store: ReferenceStore | None
    """None where the loss needs no reference."""
    datasets: Sequence[TokenizedDataset]
    sums: Sequence[Float64s]
    """(S,) log-probs in nats of each data set's sequences; empty without a store."""
    values: Sequence[Values | None]
    """What the loss reads of each data set: its sums, or (N,) log-probs of its tokens, or nothing."""

    @property
    def description(self) -> str:
        """Which cache, for people."""
        if self.store is None:
            return "none: the loss needs no reference"
        return f"{self.store.path}, identity {self.store.identity.digest}"

    def audit_apart(self, config: Config) -> bool:
        """Audits with the reference model, alone in memory, unless the policy starts as that model.

        Returns:
            Whether the policy is still to be audited with. All ranks must call it.
        """
        store = self.store
        if store is None or config.reference.audit_rows == 0:
            return False
        if distributed.on_main(lambda: policy_is_reference(config, store.identity, store.cache_dir)):
            return True
        model = reference_model(config)
        with frozen_scorer(model, sharded=is_sharded(config.reference.sharding, model)) as scorer:
            self.audit_with(scorer, config)
        return False

    def audit_with(self, score: Callable[[TreeBatch], Tensor], config: Config) -> None:
        """Recomputes a few rows and compares; raises UserError. All ranks must call it."""
        assert self.store is not None
        result = audit(score, self.datasets, self.sums, self.store, num_rows=config.reference.audit_rows)
        terminal.note(
            f"audit: {result.rows} cached rows recomputed, largest difference {result.largest:.2g} nats, "
            f"{result.share:.0%} of what rounding may do"
        )

    def record(self, config: Config, start: Path | None) -> None:
        """Remembers the rows that the run uses; a run that goes on from `start` must use the same ones."""
        if self.store is None:
            return
        if start is not None and config.reference.audit_rows > 0:
            check_rows(start.absolute().parents[1], self.store, self.datasets, self.sums)
        if start is None or config.reference.audit_rows > 0:  # it may branch off another run
            record_rows(Path(config.run_dir), self.store, self.datasets, self.sums)


def open_reference(
    config: Config, datasets: Sequence[TokenizedDataset], *, needed: bool, per_token: bool, command: str
) -> ReferenceUse:
    """Reads the cache for a run. All ranks must call it.

    Args:
        config: The experiment.
        datasets: Whose values.
        needed: Whether the loss compares with a reference.
        per_token: Whether it weighs tokens.
        command: What a person runs to fill the cache, for the message.

    Raises:
        UserError: The cache lacks rows, or log-probs of tokens, or is damaged.
    """
    if not needed:
        return ReferenceUse(store=None, datasets=datasets, sums=[], values=[None] * len(datasets))
    store = reference_store(config)
    sums = reference_logps(datasets, store, command)
    values: list[Values] = list(sums)
    if per_token:
        values = [reference_token_logps(data, store, command) for data in datasets]
    return ReferenceUse(store=store, datasets=datasets, sums=sums, values=values)


def reference_store(config: Config) -> ReferenceStore:
    """The cache of the reference model; rank 0 hashes the files, the others are told."""
    cache_dir = Path(config.reference.cache_dir)
    identity = distributed.on_main(lambda: reference_identity(reference_model(config), cache_dir))
    return ReferenceStore(cache_dir, identity)
