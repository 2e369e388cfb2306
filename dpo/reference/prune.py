"""Maintenance of a cache: statistics, verification, and joining and dropping rows.

Nothing here needs a model. Shards that other processes write meanwhile are not touched.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dpo.errors import UserError
from dpo.reference.shards import UNFINISHED, has_token_logps, read_shard, write_shard, written_at
from dpo.reference.store import ReferenceStore
from dpo.reference.table import KeyIndex, ReferenceRows, index_keys

SMALL_SHARD_ROWS = 250_000
"""Shards with fewer rows are joined into larger ones."""
LARGE_SHARD_ROWS = 2_000_000
"""A joined shard ends at this many rows."""
LARGE_SHARD_TOKENS = 1 << 28
"""A joined shard with log-probs per token also ends at this many tokens: offsets are 32-bit integers."""
ABANDONED_SECONDS = 3600
"""An unfinished shard of this age was left behind by a killed process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheInfo:
    """A cache in numbers."""

    rows: int
    """Distinct sequences."""
    copies: int
    """Rows beyond the first of each sequence."""
    rows_with_tokens: int
    """Distinct sequences that have log-probs per token."""
    shards: int
    unfinished: int
    """Shards under a temporary name: being written, or left behind by a killed process."""
    bytes: int
    """Size of all shards."""


def cache_info(store: ReferenceStore) -> CacheInfo:
    """Counts rows, shards and bytes; UserError if a shard is damaged."""

    def count(shards: list[Path]) -> CacheInfo:
        table, with_tokens = store.load(), store.load(with_tokens=True)
        written = sum(len(read_shard(path, store.identity.digest)) for path in shards)
        return CacheInfo(
            rows=len(table),
            copies=written - len(table),
            rows_with_tokens=len(with_tokens),
            shards=len(shards),
            unfinished=len(list(store.path.glob(UNFINISHED))),
            bytes=sum(path.stat().st_size for path in shards),
        )

    return store.read_shards(count)


def verify(store: ReferenceStore) -> int:
    """Reads every shard with its checksums and compares copies; returns the number of rows.

    Raises:
        UserError: All bad shards (damaged, or of another model), one per line; or copies that disagree.
    """
    found = store.read_shards(lambda shards: [line for path in shards for line in _damage(store, path)])
    if found:
        raise UserError(f"{len(found)} of {len(store.shards())} shards are bad:\n  " + "\n  ".join(found))
    return len(store.load())


def _damage(store: ReferenceStore, path: Path) -> Iterator[str]:
    """The message that says what is wrong with a shard; nothing for a good one."""
    try:
        read_shard(path, store.identity.digest, token_logps=True)
    except UserError as error:
        yield str(error)


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneResult:
    """What `prune` did, or would do."""

    rows: int
    """Rows before, copies counted."""
    kept: int
    """Rows after."""
    replaced: tuple[Path, ...]
    """Shards with rows that are dropped or moved to larger shards."""
    bytes: int
    """Size of those shards."""


def prune(store: ReferenceStore, wanted: KeyIndex | None, *, dry_run: bool) -> PruneResult:
    """Drops rows, and joins small shards into large ones; values do not change.

    New shards are written before old ones are removed. If the process is killed in between, the cache has
    copies of rows, but loses none.

    Args:
        store: The cache.
        wanted: Keys to keep; None keeps all.
        dry_run: Change nothing.

    Raises:
        UserError: A shard is damaged, copies disagree, or the folder cannot be written.
    """
    store.load()  # raises for damage and disagreement before anything is written
    result, kept = store.read_shards(lambda shards: _plan(shards, _kept(store, shards, wanted)))
    if dry_run:
        return result
    try:
        for with_tokens in (False, True):
            alike = [path for path in result.replaced if has_token_logps(path) == with_tokens]
            _join(store, alike, kept, with_tokens=with_tokens)
        for path in (*result.replaced, *_abandoned(store)):
            path.unlink(missing_ok=True)
    except OSError as error:  # also a shard that is gone because another process prunes the cache
        raise UserError(
            f"{store.path}: cannot prune ({error.strerror}: {error.filename}); no row is lost. Make sure "
            "that the folder is writable and that no other process prunes it, and try again"
        ) from error
    return result


Masks = dict[Path, npt.NDArray[np.bool_]]


def _plan(shards: Sequence[Path], kept: Masks) -> tuple[PruneResult, Masks]:
    """What to replace: shards that lose rows, and small shards if there are several of the same kind (with or
    without log-probs per token).
    """
    kinds = {path: has_token_logps(path) for path in shards}
    small = [path for path in shards if len(kept[path]) < SMALL_SHARD_ROWS]
    several = {kind for kind in (False, True) if sum(kinds[path] == kind for path in small) > 1}
    replaced = [p for p in shards if not kept[p].all() or (p in small and kinds[p] in several)]
    result = PruneResult(
        rows=sum(len(mask) for mask in kept.values()),
        kept=sum(int(mask.sum()) for mask in kept.values()),
        replaced=tuple(replaced),
        bytes=sum(path.stat().st_size for path in replaced),
    )
    return result, kept


def _abandoned(store: ReferenceStore) -> list[Path]:
    """Unfinished shards that no process is writing any more."""
    before = time.time() - ABANDONED_SECONDS
    found = []
    for path in store.path.glob(UNFINISHED):
        with suppress(FileNotFoundError):  # it has just been finished
            found += [path] if path.stat().st_mtime < before else []
    return found


def _kept(store: ReferenceStore, shards: Sequence[Path], wanted: KeyIndex | None) -> Masks:
    """Which rows stay: of each wanted key the copy whose sum is in use, and the copy whose tokens are."""
    keys = [read_shard(path, store.identity.digest).keys for path in shards]
    if not keys:
        return {}
    everything = np.concatenate(keys)
    in_use = np.zeros(len(everything), dtype=bool)
    in_use[index_keys(everything)[1]] = True
    has_tokens = np.repeat([has_token_logps(path) for path in shards], [len(part) for part in keys])
    in_use[np.flatnonzero(has_tokens)[index_keys(everything[has_tokens])[1]]] = True
    if wanted is not None:
        in_use &= wanted.find(everything) >= 0
    return dict(zip(shards, np.split(in_use, np.cumsum([len(part) for part in keys])[:-1]), strict=True))


def _join(store: ReferenceStore, shards: Sequence[Path], kept: Masks, *, with_tokens: bool) -> None:
    """Writes the kept rows of some shards into larger ones, whose time keeps the order of copies by age."""
    for rows in _in_large_parts(store, shards, kept, with_tokens=with_tokens):
        # A copy with tokens must not become older than the copy without them whose sum is in use.
        time_ns = written_at(shards[-1] if with_tokens else shards[0])
        write_shard(store.path, rows, store.identity.digest, time_ns=time_ns)


def _in_large_parts(
    store: ReferenceStore, shards: Sequence[Path], kept: Masks, *, with_tokens: bool
) -> Iterator[ReferenceRows]:
    """The kept rows, joined up to the size of a large shard."""
    parts: list[ReferenceRows] = []
    for path in shards:
        parts.append(read_shard(path, store.identity.digest, token_logps=with_tokens).where(kept[path]))
        tokens = sum(int(part.num_tokens.sum()) for part in parts) if with_tokens else 0
        if sum(map(len, parts)) >= LARGE_SHARD_ROWS or tokens >= LARGE_SHARD_TOKENS:
            yield ReferenceRows.joined(parts)
            parts = []
    if sum(map(len, parts)):
        yield ReferenceRows.joined(parts)
