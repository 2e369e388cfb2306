"""Which model is the reference: the policy's start, an adapter's base, or the one that is named."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from unit.reference.samples import sha256

from dpo.config import ModelConfig, ReferenceConfig
from dpo.reference.identity import ReferenceIdentity, policy_is_reference, reference_identity, reference_model

Identify = Callable[[Path], ReferenceIdentity]
MakeAdapter = Callable[..., Path]


def test_the_reference_is_the_start_of_the_policy_unless_named(folder: Path) -> None:
    policy = ModelConfig(name_or_path=str(folder), revision="r1", dtype="float32", attention="eager")
    assert reference_model(policy, ReferenceConfig()) == policy
    expected = ModelConfig(name_or_path="other", dtype="float32", attention="eager")
    assert reference_model(policy, ReferenceConfig(model="other")) == expected


def test_the_reference_of_an_adapter_is_its_base_with_the_adapter_as_it_was(
    identify: Identify, folder: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    identities = [identify(folder)]
    for name, scale in (("zero", 0.0), ("other", 0.3)):
        policy = ModelConfig(name_or_path=str(make_adapter(name, folder, scale=scale)))
        model = reference_model(policy, ReferenceConfig())
        assert model == policy
        identities.append(reference_identity(model, tmp_path / "cache"))
        assert policy_is_reference(policy, identities[-1], tmp_path / "cache")
    assert len({identity.digest for identity in identities}) == 3
    assert all(identity.weights == identities[0].weights for identity in identities)


def test_an_adapter_that_is_named_as_reference_differs_from_its_base_by_the_adapter_only(
    identify: Identify, folder: Path, make_adapter: MakeAdapter
) -> None:
    base = identify(folder)
    adapter = make_adapter("adapter", folder)
    named = reference_model(ModelConfig(name_or_path=str(folder)), ReferenceConfig(model=str(adapter)))
    assert named.name_or_path == str(adapter)
    found = identify(adapter)
    assert replace(found, adapter={}) == base
    assert found.adapter == {
        name: sha256(adapter / name) for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    assert {line.partition(".")[0] for line in base.differences(found)} == {"adapter"}
    assert found.digest != base.digest


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_edited_adapter_is_another_reference(
    identify: Identify, folder: Path, make_adapter: MakeAdapter, file: str
) -> None:
    adapter = make_adapter("adapter", folder)
    before = identify(adapter)
    with (adapter / file).open("ab") as written:
        written.write(b" ")
    after = identify(adapter)
    assert (after.digest != before.digest, after.weights == before.weights) == (True, True)
    assert [line.partition(":")[0] for line in before.differences(after)] == [f"adapter.{file}"]


def test_the_policy_is_the_reference_by_content(folder: Path, tmp_path: Path) -> None:
    cache, copied = tmp_path / "cache", Path(shutil.copytree(folder, tmp_path / "copy"))
    identity = reference_identity(ModelConfig(name_or_path=str(copied)), cache)
    policy = ModelConfig(name_or_path=str(folder))
    assert policy_is_reference(policy, identity, cache)
    with (folder / "model.safetensors").open("ab") as weights:
        weights.write(b"\0")
    assert not policy_is_reference(policy, identity, cache)
