"""Law 4 for one family of each kind: the same steps and weights on one rank and on two under ZeRO-2 and 3."""

from pathlib import Path
from typing import Any

import pytest
import torch
from family_ranks import BALANCED, IN_BFLOAT16, KINDS, STEPS, measure, on_ranks
from ranks import free_port, rank_environment, start_rank, wait
from rig import deepspeed_variables
from safetensors.torch import load_file

from benchmarks.tiny_models import tiny_model

STAGES = (2, 3)
BIAS = "e_score_correction_bias"
Measured = dict[str, Any]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    for family in {*KINDS, *IN_BFLOAT16}:
        model = tiny_model(family)
        for name, buffer in model.named_buffers():
            if name.endswith(BIAS):
                buffer += 0.01 * torch.arange(buffer.numel()) / 3
        model.save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def alone(models: Path) -> Measured:
    measure(models, models / "alone.pt")
    found: Measured = torch.load(models / "alone.pt")
    return found


@pytest.fixture(scope="module")
def sharded(models: Path) -> dict[int, Measured]:
    """ZeRO stage -> what two ranks measured."""
    environments, port, processes = [deepspeed_variables(models, stage) for stage in STAGES], free_port(), []
    for rank in range(2):
        mine = [{**rank_environment(rank, 2, port), **environment} for environment in environments]
        processes.append(start_rank(on_ranks, mine, models, models))
    assert wait(processes, 240) == [0, 0]
    return {stage: torch.load(models / f"{number}.pt") for number, stage in enumerate(STAGES)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("family", KINDS)
def test_sharding_changes_no_step_and_no_weight(
    alone: Measured, sharded: dict[int, Measured], family: str, stage: int
) -> None:
    found, expected = sharded[stage][family], alone[family]
    assert found["layout"] == expected["layout"] == KINDS[family]
    assert len(expected["steps"]) == STEPS
    assert expected["steps"][-1][0] < expected["steps"][0][0]  # it learns
    for ours, theirs in zip(found["steps"], expected["steps"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=5e-4, msg=name)


def test_the_balancing_loss_reaches_the_routers(alone: Measured) -> None:
    assert alone[BALANCED]["steps"][0][0] > 0


@pytest.mark.parametrize("stage", [None, *STAGES])
def test_buffers_that_authors_keep_in_float32_stay_it(
    alone: Measured, sharded: dict[int, Measured], models: Path, stage: int | None
) -> None:
    found = (alone if stage is None else sharded[stage])["bfloat16"]["deepseek_v3"]
    name = f"model.layers.1.mlp.gate.{BIAS}"
    stored = load_file(models / "deepseek_v3" / "model.safetensors")[name]
    assert not torch.equal(stored, stored.bfloat16().float())
    for place in ("training", "exported"):
        torch.testing.assert_close(found[place][name], stored, rtol=0, atol=0)
    assert found["exported"]["model.embed_tokens.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("stage", STAGES)
def test_weights_that_authors_keep_in_float32_are_refused(sharded: dict[int, Measured], stage: int) -> None:
    said = sharded[stage]["bfloat16"]["ernie4_5_moe"]
    assert isinstance(said, str)
    assert said.startswith(
        "model.dtype: bfloat16; DeepSpeed would round 2 weights of Ernie4_5_MoeForCausalLM"
    )
    assert "such as model.layers.1.mlp.gate.moe_statics" in said


def test_without_deepspeed_such_weights_stay_in_float32(alone: Measured) -> None:
    found = alone["bfloat16"]["ernie4_5_moe"]["exported"]
    kept = {name for name, weight in found.items() if weight.dtype == torch.float32}
    assert kept == {f"model.layers.1.mlp.{name}" for name in ("gate.weight", f"gate.moe_statics.{BIAS}")}
