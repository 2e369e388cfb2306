"""Data sets of the hub, through the `datasets` library: found, streamed, or fetched as Arrow files.

Every failure of the hub is a `UserError` that names the option and says what to do.
"""

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from dpo.config import DataSource
from dpo.errors import UserError


def hub_fingerprint(source: DataSource, split: str, key: str, expected: str) -> str:
    """SHA-256 (hex) of name, configuration, split and revision; nothing is fetched but descriptions.

    Raises:
        UserError: The hub does not have it, or cannot be reached.
    """
    try:
        builder = _builder(source)
        splits = _splits(source)
    except Exception as error:  # connection, authentication, parsing: these failures share no base class
        raise _hub_error(source.path, key, error, expected) from error
    if split not in splits:
        raise UserError(
            f"{key}: the hub data set {source.path} has no split named {split}; it has {', '.join(splits)}: "
            f"give {{path: {source.path}, split: ...}}"
        )
    parts = ("hub", source.path, split, str(builder.hash), *filter(None, (source.name, source.revision)))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def hub_has_split(source: DataSource, split: str) -> bool:
    """Whether the hub data set has this split; False where the hub cannot be reached."""
    try:
        return split in _splits(source)
    except Exception:  # as above
        return False


def hub_files(source: DataSource, split: str, key: str) -> list[Path]:
    """Arrow files with the rows of a split, in the cache of `datasets`; fetched if they are not there.

    Raises:
        UserError: The hub fails.
    """
    import datasets

    try:
        found = datasets.load_dataset(source.path, source.name, split=split, revision=source.revision)
    except Exception as error:  # as above
        raise _hub_error(source.path, key, error, "a data set that can be fetched") from error
    return [Path(file["filename"]) for file in found.cache_files]


def hub_rows(source: DataSource, split: str, key: str, limit: int) -> Iterator[Any]:
    """Streams the first rows of a split, without fetching the rest.

    Raises:
        UserError: The hub fails.
    """
    try:
        yield from islice(_builder(source).as_streaming_dataset(split=split), limit)
    except Exception as error:  # as above
        raise _hub_error(source.path, key, error, "rows that can be read") from error


def _builder(source: DataSource) -> Any:
    """The data set's builder; its `hash` is the revision."""
    import datasets  # takes a second to import, and most data are local files

    _reach_hub(source.path)
    return datasets.load_dataset_builder(source.path, source.name, revision=source.revision)


def _splits(source: DataSource) -> list[str]:
    import datasets

    _reach_hub(source.path)
    return list(datasets.get_dataset_split_names(source.path, source.name, revision=source.revision))


def _reach_hub(path: str) -> None:
    """Asks the hub once: `datasets` retries for half a minute, and a mistyped path should fail at once."""
    import huggingface_hub

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        huggingface_hub.HfApi().dataset_info(path, timeout=10)


def _hub_error(path: str, key: str, error: Exception, expected: str) -> UserError:
    reason = " ".join(str(error).split()) or "no reason given"
    return UserError(
        f"{key}: {path} is not a file or folder, and loading it from the hub failed ({type(error).__name__}: "
        f"{reason[:200]}); expected {expected}. Without network, HF_HUB_OFFLINE=1 uses the hub's cache"
    )
