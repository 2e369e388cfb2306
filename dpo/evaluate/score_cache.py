"""Scores on disk, by content: what a model has scored once, it does not score again.

A folder for each scorer, named by its identity, with a file for each batch that was scored. Files appear at
once (`dpo.files`) and are never changed, so that ranks and runs may write at the same time.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dpo.errors import UserError
from dpo.files import remove_abandoned, write_file

CACHE = Path("cache/scores")


class ScoreCache:
    """Content key -> score of one scorer."""

    def __init__(self, identity: str, root: Path = CACHE) -> None:
        """Reads what is there.

        Args:
            identity: Hex digest of all that decides a score.
            root: Of the caches of all scorers.

        Raises:
            UserError: A file is damaged.
        """
        self._folder = root / identity[:16]
        self._scores: dict[str, float] = {}
        remove_abandoned(self._folder)
        for file in sorted(self._folder.glob("*.json")):
            self._scores |= _read(file)

    def __len__(self) -> int:
        """Number of scores."""
        return len(self._scores)

    def find(self, keys: Sequence[str]) -> list[float] | None:
        """The scores, if all of them are there."""
        found = [self._scores[key] for key in keys if key in self._scores]
        return found if len(found) == len(keys) else None

    def add(self, scores: Mapping[str, float]) -> None:
        """Keeps those that are new, in a file."""
        new = {key: scores[key] for key in sorted(scores.keys() - self._scores.keys())}
        self._scores |= new
        content, name = json.dumps(new), hashlib.sha256("".join(new).encode()).hexdigest()[:32]
        self._folder.mkdir(parents=True, exist_ok=True)
        write_file(self._folder / f"{name}.json", content)


def content_key(text: str) -> str:
    """The key of a text, in hex digits."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _read(file: Path) -> dict[str, float]:
    try:
        return {str(key): float(score) for key, score in json.loads(file.read_text()).items()}
    except (ValueError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: not a file of scores ({error}); delete it: what it had is scored again"
        ) from error
