"""The rows of a cache in memory, each key once, and the search for millions of keys in it.

Keys are hashes: their first 8 bytes are almost always distinct. Rows are sorted by those bytes as integers,
and the last 8 bytes decide between equal ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo.data.records import KEY_BYTES
from dpo.errors import UserError

Keys = npt.NDArray[np.void]
Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]
UInt64s = npt.NDArray[np.uint64]

TOLERANCE = {"float32": 2e-5, "bfloat16": 0.25}
"""Rounding noise per token, in nats: the largest seen between two batches of one sequence, times five."""

FIND_BLOCK = 1 << 22  # keys per search: bounds the temporary memory of a join


def tolerance(dtype: str, num_tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """(N,) largest allowed difference between two computations of one sequence, in nats.

    Rounding errors have random signs, so their sum grows with the square root of the number of tokens.

    Args:
        dtype: Compute type.
        num_tokens: (N,) completion tokens of each sequence.
    """
    allowed: npt.NDArray[np.float64] = TOLERANCE[dtype] * np.sqrt(num_tokens)
    return allowed


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRows:
    """N rows, as computed or as stored in shards."""

    keys: Keys
    """(N,) V16."""
    logps: npt.NDArray[np.float64]
    """(N,) summed log-prob of the completion, in nats."""
    num_tokens: npt.NDArray[np.int32]
    """(N,) completion tokens."""
    token_logps: npt.NDArray[np.float32] | None = None
    """(num_tokens.sum(),) log-prob per token in nats, row after row, or None where they are not wanted."""

    def __len__(self) -> int:
        return len(self.keys)

    def where(self, mask: npt.NDArray[np.bool_]) -> "ReferenceRows":
        """The rows for which (N,) `mask` is true."""
        tokens = self.token_logps
        return ReferenceRows(
            keys=self.keys[mask],
            logps=self.logps[mask],
            num_tokens=self.num_tokens[mask],
            token_logps=None if tokens is None else tokens[np.repeat(mask, self.num_tokens)],
        )

    @staticmethod
    def joined(parts: Sequence["ReferenceRows"]) -> "ReferenceRows":
        """The rows of all parts, in order; with log-probs per token if every part has them."""
        if not parts:
            nothing = np.zeros(0, dtype=np.int32)
            keys = np.zeros(0, dtype=f"V{KEY_BYTES}")
            return ReferenceRows(keys=keys, logps=nothing.astype(np.float64), num_tokens=nothing)
        tokens = [part.token_logps for part in parts if part.token_logps is not None]
        return ReferenceRows(
            keys=np.concatenate([part.keys for part in parts]),
            logps=np.concatenate([part.logps for part in parts]),
            num_tokens=np.concatenate([part.num_tokens for part in parts]),
            token_logps=np.concatenate(tokens) if len(tokens) == len(parts) else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyIndex:
    """N distinct keys, sorted so that they can be searched."""

    prefixes: UInt64s
    """(N,) first halves, ascending."""
    suffixes: UInt64s
    """(N,) second halves."""

    def __len__(self) -> int:
        return len(self.prefixes)

    @property
    def keys(self) -> Keys:
        """(N,) V16."""
        return np.stack([self.prefixes, self.suffixes], axis=1).view(f"V{KEY_BYTES}")[:, 0]

    def find(self, keys: Keys) -> Int64s:
        """Position of each key, or -1.

        Args:
            keys: (M,) V16.
        """
        found = np.full(len(keys), -1, dtype=np.int64)
        for start in range(0, len(keys) if len(self) else 0, FIND_BLOCK):
            prefixes, suffixes = halves(keys[start : start + FIND_BLOCK])
            order = np.argsort(prefixes)  # sorted searches read the index in order, which is faster
            prefixes, suffixes = prefixes[order], suffixes[order]
            places = np.searchsorted(self.prefixes, prefixes).clip(max=len(self) - 1)
            match = self._matches(places, prefixes, suffixes)
            while True:  # another key with the same first half may come before ours
                following = (places + 1).clip(max=len(self) - 1)
                further = ~match & (following > places) & (self.prefixes[following] == prefixes)
                if not further.any():
                    break
                places = np.where(further, following, places)
                match = self._matches(places, prefixes, suffixes)
            found[start + order[match]] = places[match]
        return found

    def _matches(self, places: Int64s, prefixes: UInt64s, suffixes: UInt64s) -> npt.NDArray[np.bool_]:
        matches: npt.NDArray[np.bool_] = (self.prefixes[places] == prefixes) & (
            self.suffixes[places] == suffixes
        )
        return matches


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceTable:
    """The rows of a cache, each key once."""

    index: KeyIndex
    """Finds a row by its key."""
    logps: npt.NDArray[np.float64]
    """(N,) summed log-prob of the completion, in nats."""
    num_tokens: npt.NDArray[np.int32]
    """(N,) completion tokens."""

    def __len__(self) -> int:
        return len(self.index)


def index_keys(keys: Keys) -> tuple[KeyIndex, Int64s]:
    """Sorts keys and keeps each once.

    Args:
        keys: (M,) V16.

    Returns:
        The index of the N distinct keys, and (N,) the first position of each in `keys`.
    """
    prefixes, suffixes = halves(keys)
    order = np.argsort(prefixes)
    new_prefix, new_suffix = _changes(prefixes[order]), _changes(suffixes[order])
    if (new_suffix & ~new_prefix).any():  # distinct keys that share a first half: rare for hashes
        order = np.lexsort((suffixes, prefixes))
        new_prefix, new_suffix = _changes(prefixes[order]), _changes(suffixes[order])
    starts = np.flatnonzero(new_prefix | new_suffix)
    first = np.minimum.reduceat(order, starts) if len(starts) < len(order) else order
    return KeyIndex(prefixes=prefixes[first], suffixes=suffixes[first]), first


def build_table(rows: ReferenceRows, dtype: str, place: str) -> ReferenceTable:
    """Indexes rows; of several copies of a row the first is kept.

    Args:
        rows: N rows in the order in which they were written.
        dtype: Compute type, for the tolerance.
        place: The cache's folder, for the message.

    Raises:
        UserError: Copies of a row differ by more than rounding.
    """
    index, first = index_keys(rows.keys)
    if len(first) < len(rows):
        kept = first[index.find(rows.keys)]
        differ = np.abs(rows.logps - rows.logps[kept]) > tolerance(dtype, rows.num_tokens)
        differ |= rows.num_tokens != rows.num_tokens[kept]
        if differ.any():
            example = int(np.argmax(differ))
            raise UserError(
                f"{place}: {int(differ.sum())} rows are in two shards with different values, such as "
                f"{rows.logps[kept[example]]:.6f} and {rows.logps[example]:.6f} nats; one of them is wrong. "
                "Find it with dpo cache verify --recompute, or delete the folder and recompute it"
            )
    return ReferenceTable(index=index, logps=rows.logps[first], num_tokens=rows.num_tokens[first])


def _changes(values: UInt64s) -> npt.NDArray[np.bool_]:
    """(N,) whether each value differs from the one before it."""
    changes = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=changes[1:])
    return changes


def halves(keys: Keys) -> tuple[UInt64s, UInt64s]:
    """(N,) V16 -> first and second halves as integers, which numpy can sort."""
    pairs = np.ascontiguousarray(keys).view(np.uint64).reshape(-1, 2)
    return np.ascontiguousarray(pairs[:, 0]), np.ascontiguousarray(pairs[:, 1])
