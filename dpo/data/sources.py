"""Where preference data is, and its raw rows: prepared folders, Parquet, JSON Lines, hub data sets.

The first stage of reading data: `dpo.data.rows` turns the rows into preference groups. Rows are streamed,
each with its place (file and line) for messages; no file is in memory as a whole.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dpo.errors import UserError
from dpo.files import sha256_of

Split = Literal["train", "test"]

FILE_SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz")
_LOCAL_SUFFIXES = (*FILE_SUFFIXES, ".json", ".gz", ".csv", ".txt")
_EXPECTED = (
    "a folder with train.parquet and test.parquet, a .parquet, .jsonl or .jsonl.gz file, or a hub name"
)
_ROWS_PER_BATCH = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceSource:
    """One split of one data set, which exists."""

    path: str
    """As the user wrote it: a folder, a file or a hub name."""
    split: Split
    """Which part of a folder or a hub data set; no meaning for a single file."""
    files: tuple[Path, ...]
    """The files that are read; empty for a hub data set."""
    completions_are_complete: bool | None
    """From manifest.json; None where there is none."""
    fingerprint: str
    """SHA-256 (hex) of the content (of a hub data set: name, split and revision) and of the field above."""


def open_source(path: str, split: Split, *, key: str) -> PreferenceSource:
    """Finds preference data and computes its fingerprint, without reading a row.

    Args:
        path: A prepared folder, a .parquet, .jsonl or .jsonl.gz file, or a hub name.
        split: The part of a folder or hub data set to read; a single file is read as a whole.
        key: The option that holds `path`, for messages; data.train, for example.

    Raises:
        UserError: Nothing is there, its format is unknown, or the hub does not have it or cannot be reached.
    """
    local = Path(path).expanduser()
    if path and local.is_dir():
        file = local / f"{split}.parquet"
        if not file.is_file():
            raise UserError(
                f"{key}: the folder {path} has no {split}.parquet; expected a folder written by data_prep"
            )
        return _local_source(path, split, file, complete=_completions_are_complete(local / "manifest.json"))
    if path and local.is_file():
        if not local.name.endswith(FILE_SUFFIXES):
            raise UserError(
                f"{key}: {path}; expected a name that ends with {', '.join(FILE_SUFFIXES)}: convert the file"
            )
        return _local_source(path, split, local, complete=None)
    if not path or _looks_local(path):
        raise UserError(f"{key}: {path or 'an empty path'} does not exist; expected {_EXPECTED}")
    revision = str(_hub_builder(path, key).hash)
    if split not in _hub_splits(path, key):
        raise UserError(f"{key}: the hub data set {path} has no split named {split}")
    digest = hashlib.sha256("\0".join(("hub", path, split, revision)).encode())
    return PreferenceSource(
        path=path, split=split, files=(), completions_are_complete=None, fingerprint=digest.hexdigest()
    )


def has_split(path: str, split: Split) -> bool:
    """Whether `path` has this split: a folder by its files, a hub data set by its list of splits.

    A single file does not, and neither does a hub data set that cannot be reached.
    """
    local = Path(path).expanduser()
    if local.exists() or not path or _looks_local(path):
        return (local / f"{split}.parquet").is_file()
    try:
        return split in _hub_splits(path, "data")
    except UserError:
        return False


def read_rows(source: PreferenceSource) -> Iterator[tuple[str, Any]]:
    """Streams (place, row): the place is `file:line` for JSON Lines, else the row's number from 1.

    Raises:
        UserError: A broken JSON line, a damaged file, or a hub that fails.
    """
    if not source.files:
        yield from _hub_rows(source)
    for file in source.files:
        yield from _parquet_rows(file) if file.suffix == ".parquet" else _json_lines(file)


def _local_source(path: str, split: Split, file: Path, *, complete: bool | None) -> PreferenceSource:
    digest = hashlib.sha256(f"{sha256_of(file)} completions_are_complete={complete}".encode())
    return PreferenceSource(
        path=path,
        split=split,
        files=(file,),
        completions_are_complete=complete,
        fingerprint=digest.hexdigest(),
    )


def _completions_are_complete(manifest: Path) -> bool | None:
    if not manifest.is_file():
        return None
    try:
        value = json.loads(manifest.read_bytes())["completions_are_complete"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{manifest}: {error!r}; expected an object with completions_are_complete, as data_prep writes"
        ) from error
    if not (value is None or isinstance(value, bool)):
        raise UserError(f"{manifest}: completions_are_complete is {value!r}; expected true, false or null")
    return value


def _looks_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or path.count("/") > 1 or path.endswith(_LOCAL_SUFFIXES)


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{file}:{number}", json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}:{number}: not valid JSON ({error}); expected one JSON object per line"
        ) from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{file}: damaged after line {number} ({error}); fetch the file again") from error


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            for batch in parquet.iter_batches(batch_size=_ROWS_PER_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}: row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read after row {number} ({error}); write it again") from error


def _hub_rows(source: PreferenceSource) -> Iterator[tuple[str, Any]]:
    rows = iter(_hub_builder(source.path, "data").as_streaming_dataset(split=source.split))
    number = 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise _hub_error(source.path, "data", error) from error
        number += 1
        yield f"{source.path} [{source.split}]: row {number}", row


def _hub_builder(path: str, key: str) -> Any:
    """The data set's builder; its `hash` is the revision. Raises UserError for every error of the hub."""
    import datasets  # takes a second to import, and most data are local files

    try:
        _reach_hub(path)
        return datasets.load_dataset_builder(path)
    except Exception as error:  # connection, authentication, parsing: these failures share no base class
        raise _hub_error(path, key, error) from error


def _hub_splits(path: str, key: str) -> list[str]:
    import datasets

    try:
        _reach_hub(path)
        return list(datasets.get_dataset_split_names(path))
    except Exception as error:
        raise _hub_error(path, key, error) from error


def _reach_hub(path: str) -> None:
    """Asks the hub once: `datasets` retries for half a minute, and a mistyped path should fail at once."""
    import huggingface_hub

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        huggingface_hub.HfApi().dataset_info(path, timeout=10)


def _hub_error(path: str, key: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or "no reason given"
    return UserError(
        f"{key}: {path} is not a file or folder, and loading it from the hub failed ({type(error).__name__}: "
        f"{reason[:200]}); expected {_EXPECTED}. Without network, HF_HUB_OFFLINE=1 uses the hub's cache"
    )
