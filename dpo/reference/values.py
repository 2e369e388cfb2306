"""The cache as a run uses it: the reference log-probs of its data sets, aligned with their sequences.

Rank 0 reads the cache and joins it with the data; the other ranks receive the arrays. A run holds 8 bytes per
sequence of the reference, so at most 16 per pair. A sequence that the cache lacks is an error that names the
command to run: nothing here computes what is missing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from dpo import distributed, terminal
from dpo.config import ModelConfig, ReferenceConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.trees import TreeBatch
from dpo.engine.frozen import frozen_scorer, is_sharded
from dpo.errors import UserError
from dpo.reference.audit import audit, check_rows, record_rows
from dpo.reference.identity import policy_is_reference
from dpo.reference.shards import read_shard
from dpo.reference.store import ReferenceStore, reference_store
from dpo.reference.table import Float64s, Int64s, ReferenceRows, ReferenceTable, index_keys

Float32s = npt.NDArray[np.float32]
Values = Float64s | Float32s


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceUse:
    """The part of the cache that a run uses, and the checks of it."""

    model: ModelConfig
    """The reference model."""
    options: ReferenceConfig
    store: ReferenceStore | None
    """None where the loss needs no reference."""
    datasets: Sequence[TokenizedDataset]
    sums: Sequence[Float64s]
    """(S,) log-probs in nats of each data set's sequences; empty without a store."""
    values: Sequence[Values | None]
    """What the loss reads of each data set: the sums, or (N,) log-probs per completion token, or None."""

    @property
    def description(self) -> str:
        """Which cache, for people."""
        if self.store is None:
            return "none: the loss needs no reference"
        return f"{self.store.path}, identity {self.store.identity.digest}"

    def audit_apart(self, policy: ModelConfig) -> bool:
        """Audits with the reference model, alone in memory, unless the policy starts as that model.

        All ranks must call it.

        Args:
            policy: The model that the run starts from.

        Returns:
            Whether the policy starts as the reference, so that `audit_with` remains to be called with it.

        Raises:
            UserError: A recomputed row differs from the cache by more than rounding.
        """
        store = self.store
        if store is None or self.options.audit_rows == 0:
            return False
        if distributed.on_main(lambda: policy_is_reference(policy, store.identity, store.cache_dir)):
            return True
        sharded = is_sharded(self.options.sharding, self.model)
        with frozen_scorer(self.model, sharded=sharded) as scorer:
            self.audit_with(scorer)
        return False

    def audit_with(self, score: Callable[[TreeBatch], Tensor]) -> None:
        """Recomputes a few rows and compares them with the cache. All ranks must call it.

        Args:
            score: The reference model: a batch of S rows on this rank's device -> (S,) log-probs in nats.

        Raises:
            UserError: A recomputed row differs from the cache by more than rounding.
        """
        assert self.store is not None
        result = audit(score, self.datasets, self.sums, self.store, num_rows=self.options.audit_rows)
        terminal.note(
            f"audit: {result.rows} cached rows recomputed, largest difference {result.largest:.2g} nats, "
            f"{result.share:.0%} of the tolerance for rounding"
        )

    def record(self, run_dir: Path, start: Path | None) -> None:
        """Records in the run folder which rows the run uses.

        Args:
            run_dir: The run folder.
            start: The checkpoint that the run resumes from; it must have been trained on the same rows.

        Raises:
            UserError: The run of that checkpoint used another reference, or other values.
        """
        if self.store is None:
            return
        audited = self.options.audit_rows > 0
        if start is not None and audited:
            check_rows(start.absolute().parents[1], self.store, self.datasets, self.sums)
        if start is None or audited:  # the checkpoint may be of another run, with a folder of its own
            record_rows(run_dir, self.store, self.datasets, self.sums)


def open_reference(
    model: ModelConfig,
    options: ReferenceConfig,
    datasets: Sequence[TokenizedDataset],
    *,
    needed: bool,
    per_token: bool,
    command: str,
) -> ReferenceUse:
    """Reads the cache for a run. All ranks must call it.

    Args:
        model: The reference model.
        options: Where the cache is, and how it is audited.
        datasets: The data sets whose values are wanted.
        needed: Whether the loss compares with a reference; if not, nothing is read.
        per_token: Whether the loss weighs tokens.
        command: What a person runs to fill the cache, for the message.

    Raises:
        UserError: The cache lacks rows, or log-probs per token, or is damaged.
    """
    store: ReferenceStore | None = None
    sums: list[Float64s] = []
    values: list[Values | None] = [None] * len(datasets)
    if needed:
        store = reference_store(model, Path(options.cache_dir))
        sums = reference_logps(datasets, store, command)
        values = [*sums]
    if store is not None and per_token:
        values = [reference_token_logps(data, store, command) for data in datasets]
    return ReferenceUse(
        model=model, options=options, store=store, datasets=datasets, sums=sums, values=values
    )


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
        return [table.logps[_rows_of(dataset, table, store, command)] for dataset in datasets]

    return distributed.on_main(join)


def known_logps(datasets: Sequence[TokenizedDataset], store: ReferenceStore) -> list[Float64s]:
    """(S,) reference log-probs in nats of each data set's sequences, NaN for those that the cache lacks.

    For descriptions of data, which need no full cache; one process may call it alone.

    Args:
        datasets: The data sets.
        store: The cache of the reference model; it may be empty.

    Raises:
        UserError: The cache is damaged.
    """
    table = store.load()
    found = []
    for dataset in datasets:
        rows = table.index.find(dataset.keys)
        values = np.full(len(rows), np.nan)
        values[rows >= 0] = table.logps[rows[rows >= 0]]
        found.append(values)
    return found


def reference_token_logps(dataset: TokenizedDataset, store: ReferenceStore, command: str) -> Float32s:
    """(N,) reference log-probs in nats of every completion token, sequence after sequence.

    All ranks must call it.

    Args:
        dataset: The data set.
        store: The cache of the reference model.
        command: What a person runs to fill the cache, for the message.

    Raises:
        UserError: As `reference_logps`, or rows were stored without reference.store_token_logps.
    """

    def join() -> Float32s:
        table = store.load(with_tokens=True)
        _rows_of(dataset, table, store, f"{command} with reference.store_token_logps: true")
        return known_token_logps(dataset, store)

    return distributed.on_main(join)


def known_token_logps(dataset: TokenizedDataset, store: ReferenceStore) -> Float32s:
    """(N,) as `reference_token_logps`, NaN for those that the cache lacks; one process may call it alone."""
    values = np.full(int(dataset.completion_offsets[-1]), np.nan, dtype=np.float32)

    def read(shards: list[Path]) -> None:
        for path in reversed(shards):  # the oldest copy of a row is written last and stays
            _copy_tokens(read_shard(path, store.identity.digest, token_logps=True), dataset, values)

    store.read_shards(read)
    return values


def _rows_of(dataset: TokenizedDataset, table: ReferenceTable, store: ReferenceStore, command: str) -> Int64s:
    """(S,) the row of each sequence."""
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


def _copy_tokens(shard: ReferenceRows, dataset: TokenizedDataset, values: Float32s) -> None:
    """Writes the token log-probs of all sequences that a shard holds to their places in (N,) `values`."""
    if shard.token_logps is None:
        return
    index, first = index_keys(shard.keys)
    found = index.find(dataset.keys)
    sequences = np.flatnonzero(found >= 0)
    rows, lengths = first[found[sequences]], dataset.completion_tokens[sequences]
    row_starts = np.cumsum(shard.num_tokens, dtype=np.int64) - shard.num_tokens
    targets = _ranges(dataset.completion_offsets[sequences], lengths)
    values[targets] = shard.token_logps[_ranges(row_starts[rows], lengths)]


def _ranges(starts: Int64s, lengths: Int64s) -> Int64s:
    """The integers starts[i] to starts[i] + lengths[i] - 1 of every i, one range after the other."""
    before = np.cumsum(lengths) - lengths  # the numbers in all ranges before each one
    ranges: Int64s = np.arange(lengths.sum()) + np.repeat(starts - before, lengths)
    return ranges
