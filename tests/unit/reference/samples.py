"""Caches built by hand: rows from a dictionary, and a dictionary from the rows of a cache."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo.config import Config
from dpo.data.dataset import TokenizedDataset
from dpo.reference.identity import ReferenceIdentity, reference_identity, reference_model
from dpo.reference.precompute import PrecomputeResult, precompute
from dpo.reference.shards import read_shard
from dpo.reference.store import ReferenceStore
from dpo.reference.table import Keys, ReferenceRows, ReferenceTable

IDENTITY = ReferenceIdentity(
    version=2,
    weights={"model.safetensors": "aa" * 32},
    adapter={},
    code={},
    config={"n_layer": 2},
    dtype="float32",
)
Values = dict[bytes, tuple[float, int]]
"""Key, padded with zero bytes -> (log-prob in nats, completion tokens)."""
TokenValues = dict[bytes, list[float]]
"""Key, padded with zero bytes -> the log-prob of each of its tokens."""


def keys(*values: bytes) -> Keys:
    return np.frombuffer(b"".join(value.ljust(16, b"\0") for value in values), dtype="V16")


def raw(found: Keys) -> list[bytes]:
    """The 16 bytes of each key; `.item()` of a fixed-width string would drop trailing zero bytes."""
    return [found[i : i + 1].tobytes() for i in range(len(found))]


def rows(values: Values) -> ReferenceRows:
    return ReferenceRows(
        keys=keys(*values),
        logps=np.array([logp for logp, _ in values.values()], dtype=np.float64),
        num_tokens=np.array([number for _, number in values.values()], dtype=np.int32),
    )


def token_rows(values: TokenValues) -> ReferenceRows:
    """Rows whose log-prob is the sum of the log-probs of their tokens."""
    tokens = [np.asarray(row, dtype=np.float32) for row in values.values()]
    return ReferenceRows(
        keys=keys(*values),
        logps=np.array([row.astype(np.float64).sum() for row in tokens]),
        num_tokens=np.array([len(row) for row in tokens], dtype=np.int32),
        token_logps=np.concatenate(tokens),
    )


def random_rows(number: int, seed: int = 0, *, with_tokens: bool = False) -> ReferenceRows:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, number)
    if with_tokens:
        return token_rows({rng.bytes(16): rng.normal(-3, 1, n).tolist() for n in lengths})
    return rows({rng.bytes(16): (float(rng.normal(-50, 9)), int(n)) for n in lengths})


def made(folder: Path, identity: ReferenceIdentity = IDENTITY) -> ReferenceStore:
    store = ReferenceStore(folder, identity)
    store.create()
    return store


def append(store: ReferenceStore, values: Values) -> Path:
    return store.append(rows(values))


def values_of(table: ReferenceTable) -> Values:
    entries = zip(raw(table.index.keys), table.logps, table.num_tokens, strict=True)
    return {key: (float(logp), int(number)) for key, logp, number in entries}


def content(store: ReferenceStore) -> Values:
    return values_of(store.load())


def padded(values: Values) -> Values:
    return {key.ljust(16, b"\0"): value for key, value in values.items()}


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden files included."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tokens_in_use(store: ReferenceStore) -> dict[bytes, list[float]]:
    """Key -> log-probs per token of the oldest copy that has them."""
    found: dict[bytes, list[float]] = {}
    for path in store.shards():
        shard = read_shard(path, store.identity.digest, token_logps=True)
        if shard.token_logps is not None:
            split = np.split(shard.token_logps, np.cumsum(shard.num_tokens)[:-1])
            for key, tokens in zip(raw(shard.keys), split, strict=True):
                found.setdefault(key, tokens.tolist())
    return found


def number_of_rows(store: ReferenceStore) -> int:
    return sum(len(read_shard(path, store.identity.digest)) for path in store.shards())


def store_of(config: Config, cache_dir: Path | None = None) -> ReferenceStore:
    root = cache_dir or Path(config.reference.cache_dir)
    return ReferenceStore(root, reference_identity(reference_model(config.model, config.reference), root))


def fill(config: Config, datasets: Sequence[TokenizedDataset], store: ReferenceStore) -> PrecomputeResult:
    """`precompute` with the sections of a configuration."""
    model = reference_model(config.model, config.reference)
    return precompute(model, config.reference, datasets, store)


def with_options(config: Config, **options: Any) -> Config:
    return replace(config, reference=replace(config.reference, **options))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def flip_last_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
