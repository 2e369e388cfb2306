"""The identity of a model: what changes it and what does not."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from unit.reference.samples import flip_last_byte, sha256

from dpo.config import ModelConfig
from dpo.errors import UserError
from dpo.model.load import load_model
from dpo.reference.identity import ReferenceIdentity, reference_identity

Identify = Callable[..., ReferenceIdentity]
MakeAdapter = Callable[..., Path]


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def in_two_files(folder: Path, first: str = "a.safetensors", second: str = "b.safetensors") -> None:
    """Spreads the model's weights over two files."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: (first, second)[number % 2] for number, name in enumerate(sorted(whole))}
    for file in (first, second):
        (folder / file).parent.mkdir(exist_ok=True)
        part = {name: tensor for name, tensor in whole.items() if places[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_every_file_is_named_with_its_sha256(identify: Identify, folder: Path) -> None:
    identity = identify(folder)
    assert identity.weights == {"model.safetensors": sha256(folder / "model.safetensors")}
    assert (identity.version, identity.adapter, identity.code, identity.dtype) == (2, {}, {}, "bfloat16")
    assert identity.config["n_layer"] == 2
    in_two_files(folder)
    assert identify(folder).weights == {
        "a.safetensors": sha256(folder / "a.safetensors"),
        "b.safetensors": sha256(folder / "b.safetensors"),
    }


def test_a_renamed_or_copied_folder_is_the_same_model(
    identify: Identify, folder: Path, tmp_path: Path
) -> None:
    before = identify(folder)
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert identify(copied) == before
    renamed = folder.rename(tmp_path / "renamed")
    assert identify(renamed) == before
    assert identify(renamed).digest == before.digest


def test_a_renamed_weight_file_is_the_same_model(identify: Identify, folder: Path) -> None:
    before = identify(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": {"x": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    after = identify(folder)
    assert list(after.weights) == ["model-00001-of-00001.safetensors"]
    assert after.digest == before.digest


def test_files_that_swap_names_are_another_model(identify: Identify, folder: Path) -> None:
    in_two_files(folder)
    before = identify(folder)
    (folder / "a.safetensors").rename(folder / "c")
    (folder / "b.safetensors").rename(folder / "a.safetensors")
    (folder / "c").rename(folder / "b.safetensors")
    after = identify(folder)
    assert after.digest != before.digest
    assert after.weights.keys() == before.weights.keys()


def test_an_edit_of_any_file_of_several_is_another_model(identify: Identify, folder: Path) -> None:
    in_two_files(folder)
    before = identify(folder)
    for name in ("a.safetensors", "b.safetensors"):
        flip_last_byte(folder / name)
        after = identify(folder)
        assert {key for key in after.weights if after.weights[key] != before.weights[key]} == {name}
        assert after.digest != before.digest
        before = after


def test_files_of_the_same_name_in_two_folders_both_count(folder: Path, tmp_path: Path) -> None:
    in_two_files(folder, "one/model.safetensors", "two/model.safetensors")
    model = ModelConfig(name_or_path=str(folder), dtype="float32")
    load_model(model)  # such a model can be used
    digests = [reference_identity(model, tmp_path / "cache").digest]
    for part in ("one", "two"):
        flip_last_byte(folder / part / "model.safetensors")
        digests.append(reference_identity(model, tmp_path / f"cache after {part}").digest)
    assert len(set(digests)) == 3


def test_tokenizer_and_model_card_are_not_part_of_the_identity(identify: Identify, folder: Path) -> None:
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


def test_the_attention_kernel_is_not_part_of_the_identity(identify: Identify, folder: Path) -> None:
    assert identify(folder, attention="eager") == identify(folder, attention="sdpa")


@pytest.mark.parametrize(
    "changes", [{"n_head": 4}, {"activation_function": "relu"}, {"layer_norm_epsilon": 1e-3}, {"new_key": 1}]
)
def test_a_config_key_that_matters_is_part_of_the_identity(
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
def test_a_config_key_that_cannot_matter_is_not_part_of_the_identity(
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


def test_code_that_comes_with_a_model_counts_if_it_is_allowed_to_run(
    identify: Identify, folder: Path
) -> None:
    without = identify(folder)
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    (folder / "modeling_x.py").write_text("from .layers_x import Layer\n")
    (folder / "layers_x.py").write_text("class Layer: pass\n")
    assert identify(folder).code == {}
    before = identify(folder, trust_remote_code=True)
    assert before.code == {name: sha256(folder / name) for name in ("layers_x.py", "modeling_x.py")}
    (folder / "layers_x.py").write_text("class Layer: other = True\n")
    after = identify(folder, trust_remote_code=True)
    assert before.differences(after) == [
        f"code.layers_x.py: {before.code['layers_x.py'][:12]} -> {after.code['layers_x.py'][:12]}"
    ]
    assert len({without.digest, before.digest, after.digest}) == 3


def test_identity_json_holds_every_component_and_their_digest(identify: Identify, folder: Path) -> None:
    identity = identify(folder)
    stored = json.loads(json.dumps(identity.to_json()))
    assert stored.keys() == {"version", "weights", "adapter", "code", "config", "dtype", "digest"}
    assert stored["digest"] == identity.digest
    assert len(identity.digest) == 64
    assert ReferenceIdentity.from_json(stored) == identity


@pytest.mark.parametrize("part", ["version", "weights", "adapter", "code", "config", "dtype", "digest"])
def test_identity_json_with_an_edited_part_is_refused(identify: Identify, folder: Path, part: str) -> None:
    stored = identify(folder).to_json()
    stored[part] = {"version": 1, "dtype": "float32", "digest": "0" * 64}.get(part, {"x": "0" * 64})
    with pytest.raises(ValueError, match="digest does not match"):
        ReferenceIdentity.from_json(stored)


IDENTITY = ReferenceIdentity(
    version=2,
    weights={"model.safetensors": "a" * 64},
    adapter={},
    code={},
    config={"n_layer": 2, "rope": {"theta": 1e4, "type": "default"}},
    dtype="float32",
)


@pytest.mark.parametrize(
    ("change", "differences"),
    [
        ({}, []),
        ({"dtype": "bfloat16"}, ["dtype: float32 -> bfloat16"]),
        (
            {"weights": {"model.safetensors": "b" * 64}},
            [f"weights.model.safetensors: {'a' * 12} -> {'b' * 12}"],
        ),
        ({"adapter": {"a.json": "c" * 64}}, [f"adapter.a.json: None -> {'c' * 12}"]),
        (
            {"config": {"n_layer": 3, "rope": {"theta": 5e5, "type": "default"}, "new": None}},
            ["config.n_layer: 2 -> 3", "config.rope.theta: 10000.0 -> 500000.0"],
        ),
        (
            {"config": {"n_layer": 2}},
            ["config.rope.theta: 10000.0 -> None", "config.rope.type: default -> None"],
        ),
    ],
)
def test_differences_are_listed_by_component(change: dict[str, Any], differences: list[str]) -> None:
    assert IDENTITY.differences(replace(IDENTITY, **change)) == differences


def test_a_missing_model_has_no_identity(identify: Identify, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        identify(tmp_path)
