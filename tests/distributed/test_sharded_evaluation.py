"""Evaluating a model sharded over ranks gives the same samples and numbers as one replica per rank."""

import json
from pathlib import Path
from typing import Any

import pytest
from rig import Rig, make_rig
from safetensors.torch import load_file

OPTIONS = ("--evaluate.num_prompts", "7", "--evaluate.completion_tokens", "6", "--evaluate.batch_size", "2")
SAMPLING = ("--evaluate.scorer", "vader", "--data.max_length", "48")


def evaluated(rig: Rig, run: str, ranks: int, sharding: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    options = (*OPTIONS, *SAMPLING, "--evaluate.sharding", sharding)
    report = rig.completed(run, *options, command="evaluate", world_size=ranks, stage=None) / "report"
    samples = [json.loads(line) for line in (report / "samples.jsonl").read_text().splitlines()]
    return json.loads((report / "summary.json").read_text()), samples


@pytest.mark.parametrize("family", ["tied", "untied"])
def test_a_zero3_model_evaluates_alike_in_replicas_and_sharded(
    family: str, tiny_model: Path, untied: Path, tmp_path: Path
) -> None:
    rig = make_rig(tmp_path / "rig", tiny_model if family == "tied" else untied, checkpoint_every=0)
    run_dir = rig.completed("run", "--train.max_steps", "4", *SAMPLING, stage=3)
    trained = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()][-1]
    alone, samples = evaluated(rig, "run", 1, "auto")
    assert alone["eval/loss"] == pytest.approx(trained["eval/loss"], rel=1e-5), (
        "the exported model is not the trained one"
    )
    assert alone["eval/logps/chosen"] == pytest.approx(trained["eval/logps/chosen"], rel=1e-5)
    for sharding in ("zero3", "replicas"):
        found, drawn = evaluated(rig, "run", 2, sharding)
        assert drawn == samples
        assert found == pytest.approx(alone, rel=1e-4, abs=1e-5)
    assert len({row["policy"] for row in samples}) > 3


def test_a_tied_output_layer_is_written_once(tiny_model: Path, tmp_path: Path) -> None:
    rig = make_rig(tmp_path / "rig", tiny_model, checkpoint_every=0)
    run_dir = rig.completed("run", "--train.max_steps", "1", stage=3)
    weights = load_file(run_dir / "model" / "model.safetensors")
    start = load_file(tiny_model / "model.safetensors")
    assert weights.keys() == start.keys()
