"""Which files of a folder are a split: the layouts in which people keep data sets on disk.

`train.parquet`; shards `train-00000-of-00004.parquet`, also in `data/` as the hub has them; a folder
`train/*.jsonl`; what `Dataset.save_to_disk` writes; or shards without the name of a split, read as a whole.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

PLAIN_FORMATS = (".jsonl", ".json", ".csv")
COMPRESSIONS = (".gz", ".zst")
SUFFIXES = (
    ".parquet",
    ".arrow",
    *(f"{form}{packed}" for form in PLAIN_FORMATS for packed in ("", *COMPRESSIONS)),
)
"""Endings of the files that hold preference data."""
SAVED = "state.json"
"""Lists the files of a data set that `Dataset.save_to_disk` wrote."""
DESCRIPTIONS = ("manifest.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", SAVED)
"""Files about a data set beside its rows."""
_SPLITS = re.compile(r"(train|test|validation|valid|val|dev|eval)([-_.].*)?$")


def suffix_of(name: str) -> str | None:
    """The ending of a file of preference data, such as `.jsonl.gz`; None for any other file."""
    found = [suffix for suffix in SUFFIXES if name.lower().endswith(suffix)]
    return max(found, key=len, default=None)


def files_of(folder: Path, split: str, *, whole: bool) -> list[Path]:
    """The files of one split of a folder; empty where it has none.

    Args:
        folder: On a disk.
        split: Such as train or test_prefs.
        whole: Read a folder that names no split as a whole.

    Raises:
        ValueError: Several formats, or a damaged description.
    """
    for place in (folder / split, *([folder] if whole else [])):
        if (place / SAVED).is_file():
            try:
                return [
                    place / file["filename"]
                    for file in json.loads((place / SAVED).read_bytes())["_data_files"]
                ]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{place / SAVED} is damaged ({error!r})") from error
    return [folder / name for name in split_files(names_in(folder), split, whole=whole)]


def names_in(folder: Path) -> list[str]:
    """Files of a folder and of the folders in it, relative to it, with `/`."""
    files = [file for pattern in ("*", "*/*") for file in folder.glob(pattern) if file.is_file()]
    return [file.relative_to(folder).as_posix() for file in files]


def split_files(names: Sequence[str], split: str, *, whole: bool) -> list[str]:
    """As `files_of`, for the names of files relative to their folder, with `/`; in the order of reading."""
    data = [PurePosixPath(name) for name in names if suffix_of(name) and not _describes(name)]
    named = [file for file in data if _is_split(file, split)]
    if not named and whole and not any(_names_a_split(file) for file in data):
        named = [file for file in data if file.parent in (PurePosixPath(), PurePosixPath("data"))]
    formats = sorted({suffix_of(file.name) or "" for file in named})
    if len(formats) > 1:
        raise ValueError(f"it has {', '.join(formats)} files of the split {split}")
    return sorted(map(str, named))


def splits_of(names: Iterable[str]) -> list[str]:
    """Names of splits that the files of a folder seem to have, for messages."""
    data = [PurePosixPath(name) for name in names if suffix_of(name) and not _describes(name)]
    stems = {_stem(file) if file.parent.name in ("", "data") else file.parent.name for file in data}
    return sorted(stems)


def _is_split(file: PurePosixPath, split: str) -> bool:
    return file.parent.name == split or (file.parent.name in ("", "data") and _stem(file) == split)


def _stem(file: PurePosixPath) -> str:
    """The name without suffix and shard: train for train-00000-of-00004.parquet and train_3.jsonl."""
    name = file.name[: -len(suffix_of(file.name) or "")]
    return re.sub(r"([-_.](\d+(-of-\d+)?|[0-9a-f]{8,}))+$", "", name)


def _names_a_split(file: PurePosixPath) -> bool:
    return any(_SPLITS.match(part) for part in (_stem(file), file.parent.name))


def _describes(name: str) -> bool:
    return PurePosixPath(name).name in DESCRIPTIONS
