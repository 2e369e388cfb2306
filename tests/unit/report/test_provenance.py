"""Where a report's numbers come from: run folders of `train` and of `sft`, final models and snapshots."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo import distributed
from dpo.config import EvaluateConfig, LossConfig, ModelConfig, ReferenceConfig, TrainConfig
from dpo.report.content import Provenance, Ran
from dpo.report.provenance import learned_preferences, provenance_of
from dpo.tracking.run_folder import RunFolder

RAN = Ran(steps=7, warmup=2, train="40 pairs of 20 prompts", held_out="3 pairs of 3 prompts")


def provenance(run_dir: Path, ran: Ran | None = RAN, num_sampled: int = 64, **evaluate: Any) -> Provenance:
    return provenance_of(
        RunFolder(run_dir),
        ran,
        {"held-out data": "content 1234"},
        held_out="3 pairs of 3 prompts",
        num_sampled=num_sampled,
        model=ModelConfig(name_or_path="start"),
        reference=ReferenceConfig(),
        loss=LossConfig(beta=0.3),
        train=TrainConfig(pairs_per_step=8),
        evaluate=EvaluateConfig(**evaluate),
    )


def test_the_essentials_name_models_data_and_settings(tmp_path: Path) -> None:
    found = provenance(tmp_path, scorer="vader").essentials
    assert found["policy"] == f"{tmp_path}/model, from start"
    assert found["reference"] == "start"
    assert "0.3" in found["loss"]
    assert "7 optimizer steps of at most 8 pairs" in found["training"]
    assert "after 2 warm-up steps" in found["training"]
    assert found["training data"] == "40 pairs of 20 prompts"
    assert found["held-out data"] == "3 pairs of 3 prompts"
    assert "scorer vader" in found["samples"]
    assert found["samples"].startswith("64 prompts, ")
    few = provenance(tmp_path, num_sampled=3).essentials["samples"]
    assert few.startswith("3 prompts (64 were asked for), ")


def test_a_run_of_next_token_training_names_no_loss(tmp_path: Path) -> None:
    assert learned_preferences(RunFolder(tmp_path))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"loss": {"beta": 0.1}}))
    assert learned_preferences(RunFolder(tmp_path))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"train": {}}))
    assert not learned_preferences(RunFolder(tmp_path))
    found = provenance(tmp_path, None).essentials
    assert "loss" not in found
    assert "next-token" in found["training"]


def test_the_policy_of_a_snapshot_is_in_its_folder(tmp_path: Path) -> None:
    found = provenance(tmp_path, snapshot=30).essentials
    assert found["policy"] == f"{tmp_path}/snapshots/step_00000030, from start"


def test_versions_are_those_of_the_training(tmp_path: Path) -> None:
    found = provenance(tmp_path).versions
    assert found == {"held-out data": "content 1234", "evaluated on": "1 rank(s), cpu"}
    trained = {"engine": "DeepSpeed", "world_size": 4, "python": "3.12", "git_commit": None}
    (tmp_path / "environment.json").write_text(json.dumps({**trained, "packages": {"torch": "2.9"}}))
    found = provenance(tmp_path).versions
    assert found["trained by"] == "DeepSpeed, 4 rank(s)"
    assert found["versions"] == "python 3.12, torch 2.9"
    assert found["code"] == "git commit unknown"


def test_commands_use_the_launcher_with_several_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    assert provenance(tmp_path).commands[-1] == f"python -m dpo evaluate --config {file}"
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert provenance(tmp_path).commands[0] == f"NPROC=2 launch/run precompute-ref --config {file}"
