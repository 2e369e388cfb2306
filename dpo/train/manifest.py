"""The manifest of a checkpoint: size and SHA-256 of every file, signed with a key of the run's folder.

DeepSpeed's state is a pickle, and opening a pickle runs what it says. So it is opened only after its digest
matched a manifest whose signature shows that this run, and nobody else, has written it.
"""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

MANIFEST = "manifest.json"
KEY_FILE = "checkpoint.key"
FORMAT = 2
KEY_BYTES = 32

FileDigests = Mapping[str, dict[str, int | str]]
"""Path within the checkpoint -> {"bytes": size, "sha256": hex digits}."""


class NotValid(Exception):  # noqa: N818  (an answer)
    """A checkpoint is not as it was written; the message says what differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself."""

    step: int
    world_size: int
    engine: str
    """How the policy was sharded, such as `DeepSpeed ZeRO-2`."""
    fingerprints: dict[str, str]
    """Name -> digest of what the run was started on: data and model."""
    files: FileDigests


def write_manifest(manifest: Manifest, folder: Path, run_dir: Path) -> None:
    """Signs the manifest with the run's key, which is made where there is none, and flushes it."""
    content = {"format": FORMAT, **asdict(manifest)}
    signed = {**content, "signature": _signature(content, _make_key(run_dir))}
    (folder / MANIFEST).write_text(json.dumps(signed, indent=1))
    sync(folder / MANIFEST)
    for inner in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(inner)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint of RUN_DIR/checkpoints/.

    Raises:
        NotValid: There is none, it was not written by this run, or files were added.
    """
    key_file = folder.absolute().parents[1] / KEY_FILE
    try:
        content = json.loads((folder / MANIFEST).read_text())
        key = bytes.fromhex(key_file.read_text())
        if len(key) != KEY_BYTES:
            raise NotValid(f"{key_file} is damaged")
        signature = content.pop("signature")
        if content.pop("format") != FORMAT:
            raise NotValid(f"{MANIFEST} has another format: it was written by another version")
        manifest = Manifest(**content)
    except FileNotFoundError as error:
        raise NotValid(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise NotValid(f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    expected = _signature({"format": FORMAT, **content}, key)
    if not hmac.compare_digest(str(signature).encode(), expected.encode()):
        raise NotValid(f"{MANIFEST} was not written by the run of {key_file.parent}, or changed afterwards")
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    if added := sorted(there - manifest.files.keys() - {MANIFEST}):
        raise NotValid(f"{added[0]} is not in {MANIFEST}: somebody has added it")
    return manifest


def verify(folder: Path, files: FileDigests) -> None:
    """Raises NotValid for a file whose size or digest is not as recorded."""
    for name, recorded in files.items():
        path = folder / name
        try:
            if path.stat().st_size != recorded["bytes"]:
                raise NotValid(f"{name} has {path.stat().st_size:,} of {recorded['bytes']:,} bytes")
            if digest_of(path) != recorded:
                raise NotValid(f"{name} is damaged: its digest differs")
        except OSError as error:
            raise NotValid(f"{name} cannot be read ({error.strerror})") from error


def digest_of(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync(path: Path) -> Path:
    """Waits until a file, or the names in a folder, are on the disk; returns the path."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return path


def _signature(content: Mapping[str, object], key: bytes) -> str:
    return hmac.new(key, json.dumps(content, sort_keys=True).encode(), "sha256").hexdigest()


def _make_key(run_dir: Path) -> bytes:
    file = run_dir / KEY_FILE
    if not file.is_file():
        writing = file.with_name(f".{KEY_FILE}.writing")
        writing.unlink(missing_ok=True)
        with os.fdopen(os.open(writing, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
            stream.write(secrets.token_hex(KEY_BYTES))
        sync(writing)
        writing.rename(file)
    return bytes.fromhex(file.read_text())
