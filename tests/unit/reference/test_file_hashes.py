"""The memory of file hashes in the cache's root: a file is hashed once, and a stored hash is never stale."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from unit.reference.samples import flip_last_byte, sha256

from dpo.config import ModelConfig
from dpo.errors import UserError
from dpo.reference.identity import HASHES_FILE, ReferenceIdentity, reference_identity

Identify = Callable[..., ReferenceIdentity]


def never_hash(*_: Any) -> Any:
    raise AssertionError("hashed a file")


def test_a_file_is_hashed_once(
    identify: Identify, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before, memory = identify(folder), tmp_path / "cache" / HASHES_FILE
    monkeypatch.setattr(hashlib, "file_digest", never_hash)
    assert identify(folder) == before
    for damaged in ("not JSON", "[]", "{}", json.dumps({str(folder / "model.safetensors"): "short"})):
        memory.write_text(damaged)  # then it is hashed again
        with pytest.raises(AssertionError, match="hashed"):
            identify(folder)


def test_stored_hashes_of_other_models_are_kept(identify: Identify, folder: Path, tmp_path: Path) -> None:
    identify(folder)
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    identify(copied)
    remembered = json.loads((tmp_path / "cache" / HASHES_FILE).read_text())
    assert remembered.keys() == {str(path / "model.safetensors") for path in (folder, copied)}


def test_a_file_that_changes_while_it_is_hashed_is_refused_and_its_hash_not_stored(
    identify: Identify, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file_digest = hashlib.file_digest

    def slowly(file: BinaryIO, name: str) -> Any:
        digest = file_digest(file, name)
        flip_last_byte(Path(file.name))
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(hashlib, "file_digest", slowly)
        with pytest.raises(UserError, match=r"model\.safetensors: changed while it was read"):
            identify(folder)
    assert not (tmp_path / "cache" / HASHES_FILE).exists()
    assert identify(folder).weights == {"model.safetensors": sha256(folder / "model.safetensors")}


def test_hashes_that_cannot_be_stored_are_only_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the caches should be")
    model = ModelConfig(name_or_path=str(folder))
    identity = reference_identity(model, tmp_path / "cache")
    assert identity.weights == {"model.safetensors": sha256(folder / "model.safetensors")}
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"{tmp_path}/cache/{HASHES_FILE}" in record.getMessage()


def test_the_name_of_a_file_in_the_hub_cache_is_its_hash(
    tmp_path: Path, folder: Path, identify: Identify, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "blobs" / name)
    (folder / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    monkeypatch.setattr(hashlib, "file_digest", never_hash)
    assert identify(folder).weights == {"model.safetensors": name}
