"""Looking after a cache: what is in it, is it whole, and can it be smaller.

Nothing here needs a model. Shards that others write meanwhile are left alone.
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
ABANDONED_SECONDS = 3600
LARGE_SHARD_ROWS = 2_000_000
"""Where a joined shard ends."""
LARGE_SHARD_TOKENS = 1 << 28
"""Where a joined shard with log-probs of tokens ends: their offsets are 32-bit numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheInfo:
    """A cache in numbers."""

    rows: int
    """Different sequences."""
    copies: int
    """Rows that stand in several shards, beyond the first of each."""
    rows_with_tokens: int
    """Different sequences whose tokens' log-probs are stored."""
    shards: int
    unfinished: int
    """Files that a killed process left behind while it wrote them."""
    bytes: int
    """Of all shards."""


def cache_info(store: ReferenceStore) -> CacheInfo:
    """Counts; UserError if a shard is damaged."""

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
        UserError: All damaged or foreign shards, one a line, or rows that disagree.
    """
    found = store.read_shards(lambda shards: [said for path in shards for said in _damage(store, path)])
    if found:
        raise UserError(f"{len(found)} of {len(store.shards())} shards are bad:\n  " + "\n  ".join(found))
    return len(store.load())


def _damage(store: ReferenceStore, path: Path) -> Iterator[str]:
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
    """Shards whose rows are dropped or move to larger shards."""
    bytes: int
    """Of those shards."""


def prune(store: ReferenceStore, wanted: KeyIndex | None, *, dry_run: bool) -> PruneResult:
    """Drops rows, and joins small shards into large ones; values do not change.

    New shards are written before old ones are removed: killed in between, the cache has copies, no gaps.

    Args:
        store: The cache.
        wanted: Keys to keep; None keeps all.
        dry_run: Change nothing.

    Raises:
        UserError: A shard is damaged, or the folder cannot be written.
    """
    store.load()  # refuses damage and disagreement before anything is written
    result, kept = store.read_shards(lambda shards: _plan(shards, _kept(store, shards, wanted)))
    if dry_run:
        return result
    try:
        for with_tokens in (False, True):
            alike = [path for path in result.replaced if has_token_logps(path) == with_tokens]
            _join(store, alike, kept, with_tokens=with_tokens)
        for path in (*result.replaced, *_abandoned(store)):
            path.unlink(missing_ok=True)
    except OSError as error:  # also a shard that is gone: somebody else prunes
        raise UserError(
            f"{store.path}: cannot prune ({error.strerror}: {error.filename}); no row is lost. Make sure "
            "that you may write there and that nobody else prunes it, and try again"
        ) from error
    return result


Masks = dict[Path, npt.NDArray[np.bool_]]


def _plan(shards: Sequence[Path], kept: Masks) -> tuple[PruneResult, Masks]:
    """Replaced are shards that lose rows, and small ones of which there are several of a kind."""
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
    """Half-written files that nobody is writing any more."""
    before = time.time() - ABANDONED_SECONDS
    found = []
    for path in store.path.glob(UNFINISHED):
        with suppress(FileNotFoundError):  # it was finished a moment ago
            found += [path] if path.stat().st_mtime < before else []
    return found


def _kept(store: ReferenceStore, shards: Sequence[Path], wanted: KeyIndex | None) -> Masks:
    """Which rows stay: of each wanted key the copy that is in use, and the one in use for its tokens."""
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
    """Writes what stays of some shards into larger ones, under a time at which no other copy overtakes it."""
    for rows in _in_large_parts(store, shards, kept, with_tokens=with_tokens):
        # A copy with tokens stays behind the older one without that is in use.
        time_ns = written_at(shards[-1] if with_tokens else shards[0])
        write_shard(store.path, rows, store.identity.digest, time_ns=time_ns)


def _in_large_parts(
    store: ReferenceStore, shards: Sequence[Path], kept: Masks, *, with_tokens: bool
) -> Iterator[ReferenceRows]:
    parts: list[ReferenceRows] = []
    for path in shards:
        parts.append(read_shard(path, store.identity.digest, token_logps=with_tokens).where(kept[path]))
        tokens = sum(int(part.num_tokens.sum()) for part in parts) if with_tokens else 0
        if sum(map(len, parts)) >= LARGE_SHARD_ROWS or tokens >= LARGE_SHARD_TOKENS:
            yield ReferenceRows.joined(parts)
            parts = []
    if sum(map(len, parts)):
        yield ReferenceRows.joined(parts)
