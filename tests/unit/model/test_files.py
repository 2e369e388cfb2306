"""Where a model's files are: paths, weights, adapters and code that are found, or refused by their key."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from unit.model.local_model import Edited, model_config

from dpo.config import ModelConfig
from dpo.errors import UserError
from dpo.model import files
from dpo.model.files import (
    adapter_files,
    base_of,
    check_model_path,
    check_token_ids,
    code_files,
    max_positions,
    num_parameters,
    positions_of,
    weight_files,
    weights_at_hand,
)
from dpo.model.load import load_model
from dpo.model.tokenizer import load_tokenizer


@pytest.mark.parametrize("name", ["gpt2", "org/model"])
def test_a_hub_name_passes_since_only_the_hub_can_tell(name: str) -> None:
    check_model_path(name, "model.name_or_path")


@pytest.mark.parametrize("name", ["/no/such/model", "./no", "~/no", "runs/no/model"])
def test_a_path_that_does_not_exist_is_refused_by_its_key(name: str) -> None:
    with pytest.raises(UserError, match=rf"reference\.model: {name}"):
        check_model_path(name, "reference.model")


def test_a_folder_or_file_that_is_not_a_model_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    check_model_path(str(tiny_model), "model.name_or_path")
    with pytest.raises(UserError, match=r"config\.json"):
        check_model_path(str(tmp_path), "model.name_or_path")
    with pytest.raises(UserError, match=r"model\.name_or_path: "):
        check_model_path(str(tiny_model / "config.json"), "model.name_or_path")


def test_a_broken_config_is_refused_before_anything_is_loaded(edited: Edited) -> None:
    model = edited(lambda folder: (folder / "config.json").write_text("{"))
    with pytest.raises(UserError, match=r"model\.name_or_path: .*config\.json"):
        max_positions(model)


def test_a_token_id_without_an_embedding_is_refused_by_its_key(edited: Edited, tiny_model: Path) -> None:
    rows = json.loads((tiny_model / "config.json").read_text())["vocab_size"]
    check_token_ids(model_config(tiny_model), rows - 1, "reference.model")
    with pytest.raises(UserError, match=rf"reference\.model: .*{rows} embeddings.* {rows};"):
        check_token_ids(model_config(tiny_model), rows, "reference.model")

    def nest(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"vocab_size": 9, "text_config": {"vocab_size": 4}}))

    with pytest.raises(UserError, match="4 embeddings"):
        check_token_ids(edited(nest), 5, "model.name_or_path")


def test_weights_in_another_format_are_refused(edited: Edited) -> None:
    model = edited(lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"))
    with pytest.raises(UserError, match="safetensors"):
        weight_files(model)


def test_the_weight_files_are_the_single_one_or_those_of_the_index_in_name_order(edited: Edited) -> None:
    def shard(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "b.safetensors")
        shutil.copy(folder / "b.safetensors", folder / "a.safetensors")
        index = {"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    assert [path.name for path in weight_files(edited(shard))] == ["a.safetensors", "b.safetensors"]


def test_the_single_weight_file_is_the_folders(tiny_model: Path) -> None:
    assert weight_files(model_config(tiny_model)) == [tiny_model / "model.safetensors"]


def test_weights_are_at_hand_when_every_file_is_local(edited: Edited, tiny_model: Path) -> None:
    assert weights_at_hand(model_config(tiny_model))

    def shard(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "a.safetensors")
        index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    model = edited(shard)
    assert not weights_at_hand(model)
    (Path(model.name_or_path) / "b.safetensors").touch()
    assert weights_at_hand(model)


def test_parameters_of_several_weight_files_are_counted_together(edited: Edited, tiny_model: Path) -> None:
    def spread(folder: Path) -> None:
        whole = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        for number, (name, tensor) in enumerate(whole.items()):
            save_file({name: tensor}, folder / f"{number}.safetensors")
        index = {"weight_map": {name: f"{number}.safetensors" for number, name in enumerate(whole)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    expected = sum(parameter.numel() for parameter in load_model(model_config(tiny_model)).parameters())
    assert num_parameters(edited(spread)) == expected


def add_adapter(folder: Path, settings: str = '{"base_model_name_or_path": "base"}') -> None:
    (folder / "adapter_config.json").write_text(settings)
    (folder / "adapter_model.safetensors").write_bytes(b"")


def test_the_revision_of_an_adapter_is_not_that_of_its_base(tmp_path: Path) -> None:
    add_adapter(tmp_path)
    model = ModelConfig(name_or_path=str(tmp_path), revision="r1", dtype="float32", attention="eager")
    assert base_of(model) == ModelConfig(name_or_path="base", dtype="float32", attention="eager")


def test_a_model_beside_an_adapter_is_its_base(edited: Edited) -> None:
    model = edited(add_adapter)
    assert base_of(model) == model  # as in transformers
    assert [path.name for path in adapter_files(model)] == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


@pytest.mark.parametrize("settings", ["{", "{}", "[]", "null", '{"base_model": "x"}'])
def test_an_adapter_that_names_no_base_is_refused(tmp_path: Path, settings: str) -> None:
    add_adapter(tmp_path, settings)
    with pytest.raises(UserError, match=r"adapter_config\.json: .*base_model_name_or_path"):
        base_of(model_config(tmp_path))


def test_an_adapter_without_weights_is_refused(tmp_path: Path) -> None:
    add_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=rf"no adapter_model\.safetensors in {tmp_path}"):
        adapter_files(model_config(tmp_path))


def add_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "one.Config",
        "AutoModelForCausalLM": "two.Model",
        "AutoTokenizer": ["slow.Tokenizer", None],
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "one.py").write_text("class Config: pass\n")
    (folder / "two.py").write_text("from .three import Layer\nfrom .one import Config\n")
    (folder / "three.py").write_text("from .two import Model\nimport json\n")  # circular
    (folder / "inner").mkdir(exist_ok=True)
    (folder / "inner" / "four.py").write_text("print('only imported as part of a package')\n")


def test_the_code_of_a_local_model_is_every_module_in_its_folder(edited: Edited) -> None:
    model = edited(add_code)
    assert code_files(model) == []
    names = [path.name for path in code_files(replace(model, trust_remote_code=True))]
    assert sorted(names) == ["four.py", "one.py", "three.py", "two.py"]


def test_code_in_another_repository_is_what_it_maps_and_what_that_imports(
    edited: Edited, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "config.json").write_text("{}")
    add_code(elsewhere)

    def refer(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config["auto_map"] = {"AutoModelForCausalLM": f"{elsewhere}--two.Model"}
        (folder / "config.json").write_text(json.dumps(config))

    model = replace(edited(refer), trust_remote_code=True)
    assert [path.name for path in code_files(model)] == ["one.py", "three.py", "two.py"]
    (elsewhere / "three.py").unlink()
    with pytest.raises(UserError, match=r"no three\.py in"):
        code_files(model)


def test_a_model_that_transformers_knows_has_no_code_of_its_own(tiny_model: Path) -> None:
    assert code_files(replace(model_config(tiny_model), trust_remote_code=True)) == []


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"n_positions": 1024, "n_ctx": 512}, 1024),
        ({"max_position_embeddings": 2048}, 2048),
        ({"text_config": {"max_position_embeddings": 8}, "n_ctx": 4}, 8),
        ({"n_ctx": 512}, 512),
        ({"n_positions": None, "n_ctx": 512}, 512),
        ({}, None),
    ],
)
def test_positions_are_read_from_the_keys_models_use(config: dict[str, Any], positions: int | None) -> None:
    assert positions_of(config) == positions


def test_positions_of_the_tiny_model(tiny_model: Path) -> None:
    assert max_positions(model_config(tiny_model)) == 64


def test_the_number_of_parameters_is_that_of_the_loaded_model(tiny_model: Path) -> None:
    model = ModelConfig(name_or_path=str(tiny_model), dtype="float32")
    assert num_parameters(model) == load_model(model).num_parameters()


def test_a_hub_that_does_not_answer_is_asked_once_and_its_cache_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def no_route(self: object, name: str, **_: object) -> None:
        asked.append(name)
        raise ConnectionError("no route to host")

    monkeypatch.setattr(files.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(files.HfApi, "model_info", no_route)
    monkeypatch.setattr(files, "_no_hub", [])
    cause = (
        r"org/some-model is no folder here, the hub cannot be reached \(ConnectionError: no route to host\)"
    )
    started = time.monotonic()
    for _ in range(2):
        assert files.adapter_config(ModelConfig(name_or_path="org/some-model")) is None
        with pytest.raises(UserError, match=rf"model\.name_or_path: {cause}.*no tokenizer of it"):
            load_tokenizer(ModelConfig(name_or_path="org/some-model"))
        with pytest.raises(UserError, match=rf"{cause}.*no config\.json of it"):
            files.raw_config(ModelConfig(name_or_path="org/some-model"))
    assert asked == ["org/some-model"]
    assert time.monotonic() - started < 5  # without it each try takes half a minute
    assert "ConnectionError: no route to host" in capsys.readouterr().out
