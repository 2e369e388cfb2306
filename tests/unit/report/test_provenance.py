"""Where a report's numbers come from: run folders of `train` and of `sft`, final models and snapshots."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from dpo import distributed
from dpo.config import EvaluateConfig, LossConfig, ModelConfig, ReferenceConfig, TrainConfig
from dpo.data.dataset import TokenizedDataset, map_dataset, write_dataset
from dpo.data.records import Pair, TokenizedGroup
from dpo.report.content import Provenance
from dpo.report.provenance import learned_preferences, provenance_of
from dpo.tracking.run_folder import RunFolder


@pytest.fixture
def data(tmp_path: Path) -> TokenizedDataset:
    one = np.ones(1, np.int32)
    groups = [TokenizedGroup(prompt=one, completions=(one, one + 1), pairs=(Pair(0, 1),))] * 3
    write_dataset(groups, tmp_path / "data", Counter())
    return map_dataset(tmp_path / "data", "digest")


def provenance(run_dir: Path, data: TokenizedDataset, **evaluate: Any) -> Provenance:
    return provenance_of(
        RunFolder(run_dir),
        data,
        {"held-out data": "content 1234"},
        model=ModelConfig(name_or_path="start"),
        reference=ReferenceConfig(),
        loss=LossConfig(beta=0.3),
        train=TrainConfig(pairs_per_step=8),
        evaluate=EvaluateConfig(**evaluate),
    )


def test_the_essentials_name_models_data_and_settings(tmp_path: Path, data: TokenizedDataset) -> None:
    found = provenance(tmp_path, data, scorer="vader").essentials
    assert found["policy"] == f"{tmp_path}/model, from start"
    assert found["reference"] == "start"
    assert "0.3" in found["loss"]
    assert "8 pairs per step" in found["training"]
    assert found["held-out data"] == "3 pairs of 3 prompts"
    assert "scorer vader" in found["samples"]


def test_a_run_of_next_token_training_names_no_loss(tmp_path: Path, data: TokenizedDataset) -> None:
    assert learned_preferences(RunFolder(tmp_path))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"loss": {"beta": 0.1}}))
    assert learned_preferences(RunFolder(tmp_path))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"train": {}}))
    assert not learned_preferences(RunFolder(tmp_path))
    found = provenance(tmp_path, data).essentials
    assert "loss" not in found
    assert "next-token" in found["training"]


def test_the_policy_of_a_snapshot_is_in_its_folder(tmp_path: Path, data: TokenizedDataset) -> None:
    found = provenance(tmp_path, data, snapshot=30).essentials
    assert found["policy"] == f"{tmp_path}/snapshots/step_00000030, from start"


def test_versions_are_those_of_the_training(tmp_path: Path, data: TokenizedDataset) -> None:
    found = provenance(tmp_path, data).versions
    assert found == {"held-out data": "content 1234", "evaluated on": "1 rank(s), cpu"}
    trained = {"engine": "DeepSpeed", "world_size": 4, "python": "3.12", "git_commit": None}
    (tmp_path / "environment.json").write_text(json.dumps({**trained, "packages": {"torch": "2.9"}}))
    found = provenance(tmp_path, data).versions
    assert found["trained by"] == "DeepSpeed, 4 rank(s)"
    assert found["versions"] == "python 3.12, torch 2.9"
    assert found["code"] == "git commit unknown"


def test_commands_use_the_launcher_with_several_ranks(
    tmp_path: Path, data: TokenizedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    assert provenance(tmp_path, data).commands[-1] == f"python -m dpo evaluate --config {file}"
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert provenance(tmp_path, data).commands[0] == f"NPROC=2 launch/run precompute-ref --config {file}"
