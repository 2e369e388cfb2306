"""The page of a plan: units of numbers, and what it says if nothing fits."""

from pathlib import Path

import pytest

from dpo.config import DataConfig, ModelConfig, ReferenceConfig, TrainConfig
from dpo.planning.fit import Machine
from dpo.planning.plan import Plan, make_plan
from dpo.planning.text import PARTS, as_json, page


@pytest.fixture
def plan(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> Plan:
    return make_plan(
        ModelConfig(name_or_path=str(tiny_model)),
        DataConfig(train=str(pairs_file), cache_dir=str(tmp_path)),
        ReferenceConfig(cache_dir=str(tmp_path)),
        TrainConfig(pairs_per_step=8, checkpoint_every=0),
        Machine(num_gpus=2, gpu_memory=10**6, gpu_flops=1e12, mfu=0.4),
        exact=False,
    )


def test_every_part_of_the_plan_has_its_line(plan: Plan) -> None:
    lines = page(plan).splitlines()
    heads = [line.split()[0] for line in lines if line and not line.startswith(" ")]
    assert heads == [
        "model",
        "train",
        "steps",
        "balance",
        "memory",
        "90%",
        "advice",
        "reference",
        "training",
        "network",
        "disk",
    ]
    assert "74 are not" in page(plan)
    assert "no checkpoints (train.checkpoint_every: 0)" in page(plan)


def test_a_reference_that_moves_costs_a_forward_pass_over_what_follows(
    tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    made = make_plan(
        ModelConfig(name_or_path=str(tiny_model)),
        DataConfig(train=str(pairs_file), cache_dir=str(tmp_path)),
        ReferenceConfig(cache_dir=str(tmp_path), update_every=2),
        TrainConfig(pairs_per_step=8, num_epochs=2, checkpoint_every=0),
        Machine(num_gpus=1, gpu_memory=10**9, gpu_flops=1e12, mfu=0.4),
        exact=True,
    )
    assert (made.steps, made.updates) == (10, 4)
    assert made.update_hours == pytest.approx(made.hours / 3 * 8 / 10)  # of 3 passes, in 8 of 10 steps
    assert "it moves 4 times, " in page(made)


def test_without_a_sharding_that_fits_the_advice_is_its_reason(plan: Plan) -> None:
    assert plan.advice.sharding is None
    assert "none fits" in page(plan)
    assert f"advice     {plan.advice.reason}" in " ".join(page(plan).split()).replace(
        "advice ", "advice     "
    )


@pytest.mark.parametrize("width", [40, 80, 110])
def test_the_page_fits_the_terminal(plan: Plan, width: int) -> None:
    lines = page(plan, width).splitlines()
    assert max(map(len, lines)) <= max(width, 80)
    (table,) = [place for place, line in enumerate(lines) if "ZeRO-3 offload" in line]
    assert [line.split()[0] for line in lines[table + 1 : table + 9]] == [*PARTS]


def test_json_has_the_keys_that_scripts_read(plan: Plan) -> None:
    found = as_json(plan)
    assert found.keys() == {
        "model",
        "machine",
        "notes",
        "data",
        "steps",
        "rank_excess",
        "micro_batches",
        "max_tokens_per_micro_batch",
        "memory",
        "advice",
        "step_flops",
        "hours",
        "sent_bytes",
        "reference",
        "updates",
        "update_hours",
        "checkpoint_bytes",
        "model_bytes",
    }
    assert found["reference"].keys() == {"hits", "misses", "hours", "bytes"}
    assert found["data"]["train"]["pairs"] == 37
