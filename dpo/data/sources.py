"""Where preference data is, and its raw rows: files, folders, patterns, URLs, and data sets of the hub.

The first stage of reading data: `dpo.data.rows` turns the rows into preference groups. Training and
data_prep open their data here. Rows are streamed in blocks; no file is in memory as a whole.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from dpo.config import DataSource
from dpo.data.blocks import Block, Row, blocks_of, row_blocks
from dpo.data.hub import hub_files, hub_fingerprint, hub_has_split, hub_rows
from dpo.data.locate import SUFFIXES, files_of, names_in, splits_of, suffix_of
from dpo.data.remote import fetch, is_url, url_has_split
from dpo.errors import UserError
from dpo.files import sha256_of

_KNOWN = ".parquet, .arrow, .jsonl, .json, .csv, and .gz or .zst of the last three"
_EXPECTED = "a file, a folder, a pattern such as data/*.parquet, a URL, or a hub name"
_LOCAL_SUFFIXES = (*SUFFIXES, ".gz", ".zst", ".txt", ".xz", ".tsv", ".zip")


@dataclass(frozen=True, slots=True, kw_only=True)
class PreferenceSource:
    """One split of one data set, which exists."""

    options: DataSource
    """As the user gave it."""
    split: str
    """Which part of a folder or a hub data set; no meaning for a single file."""
    files: tuple[Path, ...]
    """The files that are read; empty for a hub data set that is not fetched yet."""
    completions_are_complete: bool | None
    """From manifest.json; None where there is none."""
    fingerprint: str
    """SHA-256 (hex) of what decides the rows: the content (of a hub data set: name, split and revision), the
    options, and the field above."""
    key: str
    """The option that names it, for messages."""

    @property
    def path(self) -> str:
        """As the user wrote it, with what sets it apart from other parts of the data set."""
        named = (self.options.name, self.options.split)
        return " ".join([self.options.path, *(f"[{name}]" for name in named if name)])


def open_source(
    source: DataSource, split: str, *, key: str, downloads: Path = Path("cache/tokenized/downloads")
) -> PreferenceSource:
    """Finds preference data and computes its fingerprint, without reading a row.

    Args:
        source: Its place and options.
        split: The part of a folder or hub data set where the source names none; a file is read as a whole.
        key: The option that holds it, for messages; data.train, for example.
        downloads: Where copies of what URLs name are kept.

    Raises:
        UserError: Nothing is there, its format is unknown, or the hub does not have it or cannot be reached.
    """
    whole, split, path = source.split is None, source.split or split, source.path
    opened = PreferenceSource(
        options=source, split=split, files=(), completions_are_complete=None, fingerprint="", key=key
    )
    if is_url(path):
        place = fetch(path, split, downloads, key, whole=whole)
        files = _split_of(place, split, key, whole=whole) if place.is_dir() else [place]
    elif any(sign in path for sign in "*?["):
        place = Path(path).expanduser()
        files = sorted(Path(place.anchor).glob(str(place.relative_to(place.anchor))))
    else:
        place = Path(path).expanduser()
        files = _split_of(place, split, key, whole=whole) if path and place.is_dir() else [place]
    if path and all(file.is_file() for file in files):
        return _with_options(_of_files(opened, files, place))
    if not path or is_url(path) or _looks_local(path):
        raise UserError(f"{key}: {path or 'an empty path'} does not exist; expected {_EXPECTED}")
    return _with_options(replace(opened, fingerprint=hub_fingerprint(source, split, key, _EXPECTED)))


def has_split(source: DataSource, split: str) -> bool:
    """Whether a folder or a hub data set has this split; False for a file, and where it cannot be reached."""
    place = Path(source.path).expanduser()
    if is_url(source.path):
        return url_has_split(source.path, split)
    if source.path and place.is_dir():
        try:
            return bool(files_of(place, split, whole=False))
        except ValueError:
            return False
    if place.exists() or not source.path or _looks_local(source.path):
        return False
    return hub_has_split(source, split)


def counterpart(source: DataSource) -> DataSource | None:
    """The held-out part beside a source of training data: test for train, test_prefs for train_prefs."""
    split = source.split or "train"
    if "train" not in split:
        return None
    other = replace(
        source, split=None if split == "train" else split.replace("train", "test"), rows=None, weight=1.0
    )
    return other if has_split(other, other.split or "test") else None


def blocks(source: PreferenceSource) -> Iterator[Block]:
    """Streams the blocks of a source, in order.

    Raises:
        UserError: A damaged file, or a hub that fails.
    """
    left = source.options.rows
    if left is not None and not source.files:
        yield from row_blocks(hub_rows(source.options, source.split, source.key, left), source.path)
        return
    files = source.files or tuple(hub_files(source.options, source.split, source.key))
    for block in chain.from_iterable(map(blocks_of, files)):
        if left is None:
            yield block
            continue
        block = block.part(0, left)
        left -= block.num_rows
        yield block
        if left == 0:
            return


def read_rows(source: PreferenceSource) -> Iterator[Row]:
    """Streams (place, row): the place is `file:line` for lines, else the file and the row's number from 1.

    Raises:
        UserError: A broken JSON line, a damaged file, or a hub that fails.
    """
    return chain.from_iterable(block.rows() for block in blocks(source))


def _split_of(folder: Path, split: str, key: str, *, whole: bool) -> list[Path]:
    try:
        files = files_of(folder, split, whole=whole)
    except ValueError as error:
        raise UserError(
            f"{key}: {folder}: {error}; expected one format: name the files by a pattern"
        ) from error
    if not files:
        others = ", ".join(splits_of(names_in(folder)))
        raise UserError(
            f"{key}: the folder {folder} has no files of the split {split}, "
            + (f"but of {others}" if others else f"nor any that ends with {_KNOWN}")
            + f"; expected {split}.parquet as data_prep writes it, or shards {split}-00000-of-00002.parquet"
        )
    return files


def _of_files(source: PreferenceSource, files: list[Path], place: Path) -> PreferenceSource:
    """The source with its files, and with what the manifest beside them says."""
    path, options = source.options.path, source.options
    formats = sorted({suffix_of(file.name) or file.suffix or "no ending" for file in files})
    if not files:
        raise UserError(f"{source.key}: no file matches {path}")
    if len(formats) > 1 or suffix_of(files[0].name) is None:
        found = f"a file with {formats[0]}" if len(formats) == 1 else f"files with {', '.join(formats)}"
        raise UserError(f"{source.key}: {path} is {found}; expected one of {_KNOWN}: convert the file")
    without_meaning = {
        "name": options.name,
        "revision": options.revision,
        "split": options.split if not place.is_dir() else None,
    }
    for name, value in without_meaning.items():
        if value is not None:
            raise UserError(
                f"{source.key}: {name}: {value}; {path} is a file or folder without it: leave it out"
            )
    complete = _completions_are_complete(place / "manifest.json") if place.is_dir() else None
    contents = " ".join(map(sha256_of, files))
    digest = hashlib.sha256(f"{contents} completions_are_complete={complete}".encode())
    return replace(
        source, files=tuple(files), completions_are_complete=complete, fingerprint=digest.hexdigest()
    )


def _with_options(source: PreferenceSource) -> PreferenceSource:
    """The source with a fingerprint that its options are part of, where it has any."""
    options = {"columns": source.options.columns, "rows": source.options.rows}
    given = {name: value for name, value in options.items() if value}
    if not given:
        return source
    content = json.dumps([source.fingerprint, given], sort_keys=True)
    return replace(source, fingerprint=hashlib.sha256(content.encode()).hexdigest())


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
