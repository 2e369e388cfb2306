"""The reference cache of one model on disk: a folder with identity.json and append-only shards.

Shards are immutable, have unique names and may overlap: any number of builders can write at once, and two
caches of one model are merged by copying shards. The loaded table has each key once.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from dpo import distributed
from dpo.config import ModelConfig
from dpo.errors import UserError
from dpo.files import remove_abandoned, write_file
from dpo.reference.identity import ReferenceIdentity, reference_identity
from dpo.reference.shards import PATTERN, has_token_logps, read_shard, write_shard, written_at
from dpo.reference.table import ReferenceRows, ReferenceTable, build_table

IDENTITY_FILE = "identity.json"
T = TypeVar("T")
SHOWN_DIFFERENCES = 4
RELOADS = 5  # attempts to read a cache whose shards another process is joining


class ReferenceStore:
    """One model's cache: the folder CACHE_DIR/<first 16 digits of its identity>."""

    def __init__(self, cache_dir: Path, identity: ReferenceIdentity) -> None:
        self.cache_dir = cache_dir
        self.identity = identity
        self.path = cache_dir / identity.digest[:16]

    @staticmethod
    def at(folder: Path) -> "ReferenceStore":
        """The cache in a folder; its identity.json says which model it belongs to.

        Raises:
            UserError: No readable identity.json, or one that does not belong to the folder.
        """
        folder = folder if folder.name not in ("", "..") else folder.resolve()
        identity = _read_identity(folder)
        store = ReferenceStore(folder.parent, identity)
        if store.path != folder:
            raise UserError(
                f"{folder}: identity.json belongs to {identity.digest[:16]}, not to this folder; the folder "
                "was renamed or the file edited: put it back, or delete the folder and recompute it"
            )
        return store

    def create(self) -> None:
        """Creates the folder and identity.json where they are missing.

        Raises:
            UserError: The folder has another identity, or cannot be written.
        """
        file = self.path / IDENTITY_FILE
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self.path)
            if not file.is_file():
                write_file(file, json.dumps(self.identity.to_json(), indent=2))
        except OSError as error:
            raise UserError(
                f"reference.cache_dir: cannot write {self.path} ({error.strerror}); expected a writable "
                "folder with free space"
            ) from error
        self._check_identity()

    def append(self, rows: ReferenceRows) -> Path:
        """Writes one shard and returns its path; UserError if it cannot be written."""
        return write_shard(self.path, rows, self.identity.digest)

    def join(self, shards: Sequence[Path]) -> Path | None:
        """Replaces shards of one builder, the oldest first, by one; returns it, or None if one is gone.

        The new one is written before the others are removed. All have log-probs per token, or none has.
        """
        try:
            with_tokens = has_token_logps(shards[0])
            parts = [read_shard(path, self.identity.digest, token_logps=with_tokens) for path in shards]
        except FileNotFoundError:  # another process prunes the cache
            return None
        # as in pruning, a copy with tokens must not become older than one without them
        time_ns = written_at(shards[-1] if with_tokens else shards[0])
        joined = write_shard(self.path, ReferenceRows.joined(parts), self.identity.digest, time_ns=time_ns)
        for path in shards:
            path.unlink(missing_ok=True)
        return joined

    def shards(self) -> list[Path]:
        """All shards, the oldest first."""
        return sorted(self.path.glob(PATTERN))

    def load(self, *, with_tokens: bool = False) -> ReferenceTable:
        """All shards as one table; empty if there is no cache yet.

        Args:
            with_tokens: Only the rows that have log-probs per token.

        Raises:
            UserError: A shard is damaged or of another model, the folder has another identity, or two shards
                disagree.
        """
        found: dict[Path, ReferenceRows] = {}  # also of shards that were joined meanwhile

        def read(shards: list[Path]) -> list[ReferenceRows]:
            for path in shards:
                if path not in found and (not with_tokens or has_token_logps(path)):
                    found[path] = read_shard(path, self.identity.digest)
            return [found[path] for path in sorted(found)]

        parts = self.read_shards(read)
        return build_table(ReferenceRows.joined(parts), self.identity.dtype, str(self.path))

    def read_shards(self, read: Callable[[list[Path]], T]) -> T:
        """The result of `read` on all shards, the oldest first.

        Reads again if a shard disappears meanwhile because another process joins shards.

        Args:
            read: Reads shards, and does not catch FileNotFoundError.

        Raises:
            UserError: The folder has another identity, or shards keep disappearing.
        """
        for _ in range(RELOADS):
            shards = self.shards()
            if shards:
                self._check_identity()
            with suppress(FileNotFoundError):
                return read(shards)
        raise UserError(
            f"{self.path}: shards disappear while they are read; wait until no process prunes this cache"
        )

    def nearest_other(self) -> str | None:
        """How the most similar other cache under the same root differs, for people who expected this one to
        be filled; None if there is no other.
        """
        found = []
        for file in self.cache_dir.glob(f"*/{IDENTITY_FILE}"):
            try:
                other = ReferenceStore.at(file.parent)
            except UserError:
                continue
            if other.identity.digest != self.identity.digest:
                differences = other.identity.differences(self.identity)
                found.append((len(differences), other.path.name, differences))
        if not found:
            return None
        _, name, differences = min(found)
        shown = [*differences[:SHOWN_DIFFERENCES], *(["..."] if len(differences) > SHOWN_DIFFERENCES else [])]
        return f"the nearest other cache, {name}, belongs to a model that differs in {'; '.join(shown)}"

    def _check_identity(self) -> None:
        stored = _read_identity(self.path)
        if stored.digest != self.identity.digest:
            raise UserError(
                f"{self.path}: the cache belongs to another reference model: "
                f"{'; '.join(stored.differences(self.identity))}. Delete the folder, or use another "
                "reference.cache_dir"
            )


def reference_store(model: ModelConfig, cache_dir: Path) -> ReferenceStore:
    """The cache of a reference model. Rank 0 hashes the model's files; all ranks must call it.

    Args:
        model: The reference model.
        cache_dir: Root of the caches.

    Raises:
        UserError: No such model, or no safetensors in it.
    """
    return ReferenceStore(cache_dir, distributed.on_main(lambda: reference_identity(model, cache_dir)))


def _read_identity(folder: Path) -> ReferenceIdentity:
    file = folder / IDENTITY_FILE
    try:
        return ReferenceIdentity.from_json(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{file}: not the identity of a cache ({type(error).__name__}: {error}); restore it, or delete "
            "the folder and recompute it"
        ) from error
