"""Data behind a URL (s3://, gs://, hf://, memory://, ...): copied once, beside the tokenized data.

fsspec lists and copies. A copy is named by the URL and by what the store says of each file's state, such as
its etag: a file that changes there is copied again.
"""

import hashlib
import re
from pathlib import Path, PurePosixPath
from typing import Any

from dpo import terminal
from dpo.data.locate import DESCRIPTIONS, split_files, splits_of
from dpo.errors import UserError
from dpo.files import atomic_folder

_URL = re.compile(r"[a-z][a-z0-9+.-]*://|[a-z0-9+.-]+::")


def is_url(path: str) -> bool:
    """Whether a path is a URL that fsspec opens."""
    return bool(_URL.match(path))


def url_has_split(url: str, split: str) -> bool:
    """Whether a URL names a folder with files of this split; False where it cannot be reached."""
    try:
        _, _, names, is_file = _listed(url, split, whole=False)
    except Exception:  # each store has failures of its own
        return False
    return bool(names) and not is_file


def fetch(url: str, split: str, folder: Path, key: str, *, whole: bool) -> Path:
    """A local copy of a file, of the files that a pattern names, or of a folder's files of a split.

    Args:
        url: With a protocol that fsspec knows.
        split: Such as train.
        folder: Where copies are kept.
        key: The option that holds the URL, for messages.
        whole: Copy a folder that names no split as a whole.

    Returns:
        A file, or a folder with the copied files.

    Raises:
        UserError: Nothing is there, it cannot be reached, or a package for the protocol is missing.
    """
    try:
        store, root, names, is_file = _listed(url, split, whole=whole)
        states = [str(store.ukey(f"{root}/{name}")) for name in names]
        state = hashlib.sha256("\0".join([url, *names, *states]).encode()).hexdigest()
        copy = folder / state[:16]
        if names and not copy.is_dir():
            terminal.note(f"{key}: copying {len(names)} files of {url} into {copy}")
            with atomic_folder(copy, replace=False) as building:
                for name in names:
                    (building / name).parent.mkdir(parents=True, exist_ok=True)
                    store.get_file(f"{root}/{name}", str(building / name))
    except ValueError as error:  # several formats, or a protocol that nobody knows
        raise UserError(
            f"{key}: {url}: {error}; expected files of one format: name them by a pattern"
        ) from error
    except ImportError as error:
        raise UserError(f"{key}: {url}: {error}; install that package to read such URLs") from error
    except Exception as error:  # each store has failures of its own
        reason = " ".join(str(error).split()) or "no reason given"
        raise UserError(f"{key}: {url} cannot be read ({type(error).__name__}: {reason[:200]})") from error
    if not names:
        raise UserError(f"{key}: {url} has no files of the split {split}")
    return copy / names[0] if is_file else copy


def _listed(url: str, split: str, *, whole: bool) -> tuple[Any, str, list[str], bool]:
    """The store, a folder in it, the names of the files in the folder, and whether the URL is one file."""
    import fsspec

    store, path = fsspec.core.url_to_fs(url)
    if any(sign in path for sign in "*?["):
        files = sorted(map(str, store.glob(path)))
        root = str(PurePosixPath(path.split("*")[0].split("?")[0].split("[")[0] + "x").parent)
        return store, root, [file[len(root) + 1 :] for file in files], False
    if store.isfile(path):
        file = PurePosixPath(path)
        return store, str(file.parent), [file.name], True
    every = [str(file)[len(path.rstrip("/")) + 1 :] for file in store.find(path, maxdepth=2)]
    chosen = split_files(every, split, whole=whole)
    if every and not chosen:
        raise ValueError(f"it has no files of the split {split}, only of {', '.join(splits_of(every))}")
    about = [name for name in every if name in DESCRIPTIONS]
    return store, path.rstrip("/"), [*chosen, *about] if chosen else [], False
