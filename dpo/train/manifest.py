"""The manifest of a checkpoint: size and SHA-256 of every file, signed with a key in the run's folder.

DeepSpeed's state is a pickle, and loading a pickle runs code. So it is loaded only after its digest matched a
manifest whose signature shows that this run wrote it.
"""

import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dpo.files import REPLACED, sha256_of, sync_tree, write_file
from dpo.tracking.run_folder import RunFolder

MANIFEST = "manifest.json"
FORMAT = 2
KEY_BYTES = 32

FileDigests = Mapping[str, dict[str, int | str]]
"""Path within the checkpoint -> {"bytes": size, "sha256": hex digits}."""


class NotValid(Exception):  # noqa: N818  (an answer)
    """A checkpoint is not as it was written; the message says what differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint contains."""

    step: int
    world_size: int
    engine: str
    """How the policy was sharded, such as `DeepSpeed ZeRO-2`."""
    fingerprints: dict[str, str]
    """Name -> digest of what the run was started on: data and model."""
    files: FileDigests

    def with_files(self, more: FileDigests) -> "Manifest":
        """The same with more files."""
        return replace(self, files={**self.files, **more})


def write_manifest(manifest: Manifest, checkpoint: Path, folder: RunFolder) -> None:
    """Signs the manifest with the run's key, which is made if there is none, and flushes the checkpoint."""
    content = {"format": FORMAT, **asdict(manifest)}
    signed = {**content, "signature": _signature(content, make_key(folder))}
    write_file(checkpoint / MANIFEST, json.dumps(signed, indent=1))
    sync_tree(checkpoint)


def make_key(folder: RunFolder) -> bytes:
    """The run's key, which is made where there is none, or a damaged one: that signs and verifies nothing."""
    try:
        key = bytes.fromhex(folder.key.read_text())
    except (FileNotFoundError, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        key = secrets.token_bytes(KEY_BYTES)
        write_file(folder.key, key.hex(), mode=0o600)
    return key


def read_manifest(checkpoint: Path) -> Manifest:
    """The manifest of a checkpoint in RUN_DIR/checkpoints/.

    Raises:
        NotValid: There is none, it was not written by this run, or files were added.
    """
    key_file = run_of(checkpoint).key
    try:
        content = json.loads((checkpoint / MANIFEST).read_text())
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
        raise NotValid(f"{MANIFEST} was not written by the run of {key_file.parent}, or was changed")
    there = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if not path.is_dir()}
    if added := sorted(there - manifest.files.keys() - {MANIFEST}):
        raise NotValid(f"{added[0]} is not in {MANIFEST}: it was added later")
    return manifest


def run_of(checkpoint: Path) -> RunFolder:
    """The run folder that a checkpoint lies in."""
    return RunFolder(checkpoint.absolute().parents[1])


def verify(checkpoint: Path, files: FileDigests) -> None:
    """Raises NotValid for a file whose size or digest is not as recorded."""
    for name, recorded in files.items():
        path = checkpoint / name
        try:
            if path.stat().st_size != recorded["bytes"]:
                raise NotValid(f"{name} has {path.stat().st_size:,} of {recorded['bytes']:,} bytes")
            if digest_of(path) != recorded:
                raise NotValid(f"{name} is damaged: its digest differs")
        except OSError as error:
            raise NotValid(f"{name} cannot be read ({error.strerror})") from error


def digest_of(path: Path) -> dict[str, int | str]:
    """Size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _signature(content: Mapping[str, object], key: bytes) -> str:
    return hmac.new(key, json.dumps(content, sort_keys=True).encode(), "sha256").hexdigest()


def complete_checkpoints(folder: RunFolder) -> list[Path]:
    """Checkpoints with a manifest, oldest first; one that was being replaced when the run died counts."""
    found = {path.parent for path in folder.checkpoints.glob(f"step_*/{MANIFEST}")}
    for aside in folder.checkpoints.glob(f".step_*{REPLACED}/{MANIFEST}"):
        if aside.parent.with_name(aside.parent.name[1:].removesuffix(REPLACED)) not in found:
            found.add(aside.parent)
    return sorted(found, key=lambda path: path.name.lstrip("."))
