"""The one way to write anything that must survive a crash: beside its place, flushed, then renamed.

A reader sees the old content or the new one, never a part. A temporary name starts with a dot and ends in
`.writing`; what a killed process leaves under such a name is never read, and is removed by a later one.
"""

import glob
import hashlib
import io
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dpo import alive
from dpo.processes import tagged_lives, this_process

WRITING = ".writing"
REPLACED = ".replaced"
LONGEST_WRITE_SECONDS = 86_400.0
UNIVERSAL = ".universal"
"""A checkpoint in another form, while it is loaded."""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line.

    Only a line feed ends a line: `str.splitlines` also cuts where a text holds U+2028, U+0085 and the like.
    """
    with path.open(encoding="utf-8", newline="\n") as lines:
        return [json.loads(line) for line in lines]


def write_file(path: Path, content: str | bytes, *, mode: int = 0o666) -> None:
    """Replaces a file, or makes it.

    Args:
        path: Its folder exists.
        content: Text is written as UTF-8.
        mode: Permissions, less what the umask takes away.

    Raises:
        OSError: It could not be written; the old file is as it was.
    """
    path = path.resolve() if path.is_symlink() else path
    with naming(path):
        _replace(path, content, mode)


def _replace(path: Path, content: str | bytes, mode: int) -> None:
    temporary = temporary_of(path)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):  # a disk that has become read-only
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the name of the file into an OSError of the block that has none, such as that of a full disk."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = True) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` when the block ends, and is removed after an error.

    Args:
        folder: The final place; its parents are made. A link is followed.
        replace: Whether a folder that is there by then is replaced; otherwise it stays and the new one goes:
            for content that is named by its digest, and that two processes may write at once.
    """
    building = temporary_of(folder.resolve() if folder.is_symlink() else folder)
    building.mkdir(parents=True)
    try:
        yield building
        sync_tree(building)
        publish_folder(building, folder, replace=replace)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def publish_folder(building: Path, folder: Path, *, replace: bool = True) -> None:
    """Renames a finished folder into its place; see `atomic_folder`.

    For a moment the old folder has the name `.NAME.replaced`; a crash may leave it there.
    """
    folder = folder.resolve() if folder.is_symlink() else folder
    if not replace:
        try:
            building.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
            shutil.rmtree(building, ignore_errors=True)
        return
    aside = folder.with_name(f".{folder.name}{REPLACED}")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    building.rename(folder)
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)


def leftovers_of(path: Path) -> list[Path]:
    """What killed processes left beside a file or folder, under names that nobody reads.

    Args:
        path: The final place, which no living process may be writing to.
    """
    path = path.resolve() if path.is_symlink() else path
    found = [*path.parent.glob(f".{glob.escape(path.name)}.*{WRITING}")]
    found += path.parent.glob(f".{glob.escape(path.name)}{WRITING}")
    aside = path.with_name(f".{path.name}{REPLACED}")
    return found + ([aside] if aside.exists() and path.exists() else [])


def remove(path: Path) -> None:
    """Removes a file or a folder, as far as it can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def temporary_of(path: Path) -> Path:
    """A name beside `path` that nobody else uses, also on other machines, and that says whose it is."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.{this_process().tag()}{WRITING}")


def remove_abandoned(folder: Path) -> None:
    """Removes what dead processes left half written in a folder that living ones share.

    What a process of another machine left is removed after a day.
    """
    for path in folder.glob(f".*{WRITING}"):
        lives = tagged_lives(path.name.removesuffix(WRITING).rpartition(".")[2])
        if lives is None:
            with suppress(OSError):
                lives = time.time() - path.stat().st_mtime < LONGEST_WRITE_SECONDS
        if lives is False:
            remove(path)


def sync_tree(folder: Path) -> None:
    """Waits until all files of a folder, and their names, are on the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> Path:
    """Waits until a file, or the names in a folder, are on the disk; returns the path."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hex."""
    with _LivingFile(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _LivingFile(io.FileIO):
    """Each read is a sign of life."""

    def readinto(self, buffer: Any) -> int:
        alive.advanced()
        return super().readinto(buffer) or 0
