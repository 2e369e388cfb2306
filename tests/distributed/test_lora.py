"""LoRA on real ranks: the laws hold for an adapter too, sharded, in replicas and on one rank."""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from rig import Rig, make_rig, metrics
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

STEPS = 4
LORA = ("--model.lora.rank", "4", "--model.lora.alpha", "8")
ALONE: dict[str, Any] = {"world_size": 1, "stage": None}
WORLDS = [("tied", 1, 2), ("tied", 2, 0), ("tied", 2, 2), ("tied", 2, 3), ("tied", 2, None), ("untied", 2, 3)]
"""Output layer, number of ranks, and the ZeRO stage, or None for DDP."""
SHARDED = [("tied", 2), ("tied", 3), ("untied", 3)]


Runs = Callable[[str, int, int | None], Path]


@pytest.fixture(scope="module")
def rigs(tiny_model: Path, untied: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rig]:
    """For each output layer an experiment whose cache is filled without LoRA; all tests share their runs."""
    options: dict[str, Any] = {"max_steps": STEPS, "weight_decay": 0.1, "max_grad_norm": 0.5}
    folder = tmp_path_factory.mktemp("lora")
    bases = {"tied": tiny_model, "untied": untied}
    return {
        head: make_rig(folder / head, base, learning_rate=1e-2, **options) for head, base in bases.items()
    }


@pytest.fixture(scope="module")
def run_of(rigs: dict[str, Rig]) -> Runs:
    """A run of all steps with this output layer, number of ranks and ZeRO stage, made once."""

    @cache
    def made(head: str, ranks: int, stage: int | None) -> Path:
        keys = [*LORA, *(("--evaluate.watched_prompts", "4") if ranks > 1 else ())]
        return rigs[head].completed(f"{ranks}_{stage}", *keys, world_size=ranks, stage=stage)

    return made


KINDS = (
    *("--model.lora.rank", "4", "--model.lora.dora", "true", "--model.lora.rank_stabilized", "true"),
    *("--model.lora.learning_rate_ratio", "4", "--model.lora.modules_to_save", "[norm, lm_head]"),
)


def assert_same_metrics(run_dir: Path, alone: Path) -> None:
    found, expected = metrics(run_dir), metrics(alone)
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ours.keys() - {"train/rewards/accuracies", "eval/rewards/accuracies"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=2e-6), (ours["step"], name)


def model_of(run_dir: Path) -> torch.nn.Module:
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(run_dir / "model", dtype=torch.float32)
    return loaded


def assert_same_policy(found: Path, expected: Path) -> None:
    ids = torch.arange(40)[None]
    with torch.no_grad():
        logits = [model_of(run_dir)(ids).logits for run_dir in (found, expected)]
    torch.testing.assert_close(*logits, rtol=2e-3, atol=2e-3)


def test_the_first_loss_is_ln_2_from_the_cache_of_full_fine_tuning(
    rigs: dict[str, Rig], run_of: Runs
) -> None:
    rig = rigs["tied"]
    first = next(line for line in metrics(run_of("tied", 1, None)) if "train/loss" in line)
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["train/grad_norm"] > 0
    ended = rig.run("cached", *LORA, command="precompute-ref", **ALONE)
    assert " 0 computed" in ended.output
    full = rig.completed("full", "--train.max_steps", "1", **ALONE)
    assert metrics(full)[1]["train/loss"] == first["train/loss"]


@pytest.mark.parametrize(("head", "ranks", "stage"), WORLDS)
def test_results_do_not_depend_on_the_world(run_of: Runs, head: str, ranks: int, stage: int | None) -> None:
    run_dir, alone = run_of(head, ranks, stage), run_of(head, 1, None)
    assert_same_metrics(run_dir, alone)
    assert_same_policy(run_dir, alone)


@pytest.mark.parametrize(("head", "stage"), [("tied", 2), ("untied", 3)])
def test_a_run_resumes_bit_for_bit_and_on_a_different_number_of_ranks(
    rigs: dict[str, Rig], run_of: Runs, head: str, stage: int
) -> None:
    rig, whole = rigs[head], run_of(head, 2, stage)
    more = (*LORA, "--train.resume", str(whole / "checkpoints" / "step_00000002"))
    same = rig.completed(f"resumed_{stage}", *more, world_size=2, stage=stage)
    files = [folder / "model" / "model.safetensors" for folder in (same, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert_same_policy(rig.completed(f"on_one_{stage}", *more, world_size=1, stage=stage), whole)


@pytest.mark.parametrize(("head", "stage"), SHARDED)
def test_a_checkpoint_has_no_frozen_weights(run_of: Runs, head: str, stage: int) -> None:
    files = [*(run_of(head, 2, stage) / "checkpoints" / "step_00000002").rglob("*.pt")]
    assert files
    names = []
    for file in files:
        content = torch.load(file, map_location="cpu", weights_only=False)
        names += [*(content.get("module") or {}), *(content.get("frozen_param_fragments") or {})]
    assert names
    assert all(".lora_" in name for name in names), names[:3]
    assert sum(file.stat().st_size for file in files) < 400_000


def test_the_other_kinds_of_adapters_do_not_depend_on_the_world_either(rigs: dict[str, Rig]) -> None:
    """DoRA reads the weights of its layer, and whole modules are copies of them, where ZeRO-3 shards them."""
    rig = rigs["untied"]
    alone = rig.completed("kinds_alone", *KINDS, **ALONE)
    sharded = rig.completed("kinds_sharded", *KINDS, world_size=2, stage=3)
    assert metrics(alone)[1]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert_same_metrics(sharded, alone)
    assert_same_policy(sharded, alone)


@pytest.mark.parametrize(("scheme", "stage"), [("nf4", 2), ("nf4", None), ("int8", 2)])
def test_a_quantized_base_is_trained_in_replicas_and_with_a_sharded_optimizer(
    rigs: dict[str, Rig], scheme: str, stage: int | None
) -> None:
    rig, more = rigs["untied"], (*LORA, "--model.quantization", scheme)
    assert rig.run("cached", *more, command="precompute-ref", **ALONE).statuses == [0]
    alone = rig.folder / f"{scheme}_alone"
    if not alone.is_dir():
        rig.completed(f"{scheme}_alone", *more, **ALONE)
    assert metrics(alone)[1]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    run_dir = rig.completed(f"{scheme}_{stage}", *more, world_size=2, stage=stage)
    assert_same_metrics(run_dir, alone)
    assert_same_policy(run_dir, alone)
    for file in (run_dir / "checkpoints" / "step_00000002").rglob("*.pt"):
        names = torch.load(file, map_location="cpu", weights_only=False).get("module") or {}
        assert all(".lora_" in name for name in names)


@pytest.mark.parametrize(("head", "stage"), [("tied", None), ("tied", 2), ("untied", 3)])
def test_an_exported_adapter_equals_the_merged_model(
    rigs: dict[str, Rig], run_of: Runs, head: str, stage: int | None
) -> None:
    more = (*LORA, "--model.lora.export", "adapter")
    run_dir = rigs[head].completed(f"adapter_{stage}", *more, world_size=2 if stage else 1, stage=stage)
    assert not (run_dir / "model" / "model.safetensors").exists()
    assert all(".lora_" in name for name in load_file(run_dir / "model" / "adapter_model.safetensors"))
    assert_same_policy(run_dir, run_of(head, 1, None))


def test_a_run_goes_on_from_an_adapter_and_every_such_run_shares_a_cache(rigs: dict[str, Rig]) -> None:
    rig = rigs["tied"]
    first = rig.completed("first", *LORA, "--model.lora.export", "adapter", **ALONE)
    for start, stage, known in (("continue", 3, "0 sequences were cached"), ("merge", 2, " 0 computed")):
        more = ("--model.name_or_path", str(first / "model"), "--model.lora.start", start)
        assert known in rig.run("cached", *more, command="precompute-ref", **ALONE).output
        alone = rig.completed(f"{start}_alone", *more, **ALONE)
        assert metrics(alone)[1]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert_same_metrics(rig.completed(f"{start}_{stage}", *more, world_size=2, stage=stage), alone)
        resume = ("--train.resume", str(alone / "checkpoints" / "step_00000002"))
        resumed = rig.completed(f"{start}_resumed", *more, *resume, **ALONE)
        files = [folder / "model" / "model.safetensors" for folder in (resumed, alone)]
        assert files[0].read_bytes() == files[1].read_bytes()
