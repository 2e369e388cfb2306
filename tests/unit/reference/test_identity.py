"""Bytes make an identity: what changes it, what does not, and that a remembered hash is never a stale one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo.config import Config, DataConfig, ModelConfig, ReferenceConfig
from dpo.errors import UserError
from dpo.reference import identity as identity_module
from dpo.reference.identity import HASHES_FILE, ReferenceIdentity, reference_identity, reference_model


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def identify(tmp_path: Path) -> Callable[..., ReferenceIdentity]:
    def identify(folder: Path, **options: Any) -> ReferenceIdentity:
        model = ModelConfig(name_or_path=str(folder), **options)
        return reference_identity(model, tmp_path / "cache")

    return identify


Identify = Callable[..., ReferenceIdentity]


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def flip_last_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def test_a_renamed_or_copied_folder_is_the_same_model(
    identify: Identify, folder: Path, tmp_path: Path
) -> None:
    before = identify(folder)
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert identify(copied) == before
    renamed = folder.rename(tmp_path / "renamed")
    assert identify(renamed) == before
    assert identify(renamed).digest == before.digest


def test_tokenizer_and_card_are_not_the_model(identify: Identify, folder: Path) -> None:
    before = identify(folder)
    (folder / "README.md").write_text("new")
    (folder / "tokenizer_config.json").unlink()
    assert identify(folder) == before


def test_an_edited_weight_file_of_the_same_size_and_time_is_another_model(
    identify: Identify, folder: Path
) -> None:
    before, weights = identify(folder), folder / "model.safetensors"
    stat = weights.stat()
    flip_last_byte(weights)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    after = identify(folder)
    assert after.digest != before.digest
    assert (after.config, after.dtype) == (before.config, before.dtype)
    assert after.weights != before.weights


def test_a_replaced_weight_file_is_another_model(identify: Identify, folder: Path, tmp_path: Path) -> None:
    before = identify(folder)
    shutil.copy2(folder / "model.safetensors", tmp_path / "other")
    flip_last_byte(tmp_path / "other")
    (tmp_path / "other").replace(folder / "model.safetensors")
    assert identify(folder).weights != before.weights


def test_the_compute_type_is_part_of_the_identity(identify: Identify, folder: Path) -> None:
    assert identify(folder, dtype="float32").digest != identify(folder, dtype="bfloat16").digest


def test_the_attention_kernel_is_not(identify: Identify, folder: Path) -> None:
    assert identify(folder, attention="eager") == identify(folder, attention="sdpa")


@pytest.mark.parametrize(
    "changes", [{"n_head": 4}, {"activation_function": "relu"}, {"layer_norm_epsilon": 1e-3}, {"new_key": 1}]
)
def test_a_config_key_that_matters_is_part_of_it(
    identify: Identify, folder: Path, changes: dict[str, Any]
) -> None:
    before = identify(folder)
    edit_config(folder, **changes)
    assert identify(folder).digest != before.digest


@pytest.mark.parametrize(
    "changes",
    [
        {"transformers_version": "9.9", "_name_or_path": "elsewhere"},
        {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.0},
        {"use_cache": False, "eos_token_id": 5},
        {"dtype": "bfloat16"},
    ],
)
def test_a_config_key_that_cannot_matter_is_not(
    identify: Identify, folder: Path, changes: dict[str, Any]
) -> None:
    before = identify(folder)
    edit_config(folder, **changes)
    assert identify(folder) == before


def test_the_order_of_config_keys_does_not_matter(identify: Identify, folder: Path) -> None:
    before = identify(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(dict(reversed(config.items()))))
    assert identify(folder).digest == before.digest


def test_a_file_is_hashed_once(
    identify: Identify, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = identify(folder)
    monkeypatch.setattr(identity_module.hashlib, "sha256", _only_short(identity_module.hashlib.sha256))
    assert identify(folder) == before
    (tmp_path / "cache" / HASHES_FILE).write_text("not JSON")  # then it is hashed again
    with pytest.raises(AssertionError, match="hashed"):
        identify(folder)


def _only_short(sha256: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(*content: bytes) -> Any:
        assert content, "hashed a file"
        return sha256(*content)

    return refuse


def test_the_hubs_own_name_of_a_file_is_its_hash(tmp_path: Path, folder: Path, identify: Identify) -> None:
    name = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "blobs" / name)
    (folder / "model.safetensors").symlink_to(tmp_path / "blobs" / name)
    assert identify(folder).weights == (name,)


def test_identity_json_holds_every_component_and_their_digest(identify: Identify, folder: Path) -> None:
    identity = identify(folder)
    stored = json.loads(json.dumps(identity.to_json()))
    assert stored.keys() == {"version", "weights", "config", "dtype", "digest"}
    assert stored["digest"] == identity.digest
    assert len(identity.digest) == 64
    assert stored["weights"] == list(identity.weights)


def test_a_model_that_is_not_there_has_no_identity(identify: Identify, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        identify(tmp_path)


def test_the_reference_is_the_policys_start_unless_named() -> None:
    policy = ModelConfig(name_or_path="start", revision="r1", dtype="float32", attention="eager")
    config = Config(model=policy, data=DataConfig(train="d"))
    assert reference_model(config) is policy
    named = Config(model=policy, data=DataConfig(train="d"), reference=ReferenceConfig(model="other"))
    expected = ModelConfig(name_or_path="other", dtype="float32", attention="eager")
    assert reference_model(named) == expected
