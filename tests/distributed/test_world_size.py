"""Law 4: results do not depend on the number of ranks, the ZeRO stage or the micro-batch budget."""

import json
from pathlib import Path
from typing import Any

import pytest
from rig import OFFLOAD, Rig, make_rig, metrics

STEPS = 10
BUDGETS = (64, 512)
WORLDS = [*((ranks, stage) for stage in (0, 2, 3, None) for ranks in (1, 2)), (2, OFFLOAD)]
"""Number of ranks, and the ZeRO stage, or None for no DeepSpeed (one process, or DDP)."""


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Rig:
    options: dict[str, Any] = {
        "checkpoint_every": 0,
        "max_steps": STEPS,
        "evaluate_every": 5,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
    }
    return make_rig(tmp_path_factory.mktemp("worlds"), tiny_model, **options)


def steps(rig: Rig, ranks: int, stage: int | None, budget: int) -> list[dict[str, float]]:
    name = f"{ranks}_{stage}_{budget}"
    keys = ["--train.max_tokens_per_micro_batch", str(budget)]
    keys += ["--evaluate.watched_prompts", "4"] if budget == BUDGETS[0] and ranks > 1 else []
    run_dir = rig.completed(name, *keys, world_size=ranks, stage=stage)
    engine = json.loads((run_dir / "environment.json").read_text())["engine"]
    alone = "one device" if ranks == 1 else "DDP"
    offloaded = "DeepSpeed ZeRO-3, optimizer on the host"
    expected = {None: alone, OFFLOAD: offloaded}.get(stage, f"DeepSpeed ZeRO-{stage}")
    assert engine.startswith(f"{expected}, {ranks} rank(s)"), engine
    return metrics(run_dir)


@pytest.fixture(scope="module")
def expected(rig: Rig) -> list[dict[str, float]]:
    """One process without DeepSpeed, with each step in one micro-batch."""
    lines = steps(rig, 1, None, 100_000)
    assert len([line for line in lines if "train/loss" in line]) == STEPS
    return lines


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(("ranks", "stage"), WORLDS)
def test_the_same_pairs_give_the_same_steps(
    rig: Rig, expected: list[dict[str, float]], ranks: int, stage: int | None, budget: int
) -> None:
    assert_same_steps(steps(rig, ranks, stage, budget), expected)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_cached_gradient_gives_the_same_steps(
    rig: Rig, expected: list[dict[str, float]], stage: int
) -> None:
    """Also where its pieces are single completions."""
    cut = ("--train.backward", "cached", "--train.max_tokens_per_micro_batch", "16")
    assert_same_steps(metrics(rig.completed(f"cached_{stage}", *cut, stage=stage)), expected)


def test_recomputed_activations_give_the_same_steps_where_weights_are_gathered(
    rig: Rig, expected: list[dict[str, float]]
) -> None:
    recomputed = ("--model.gradient_checkpointing", "selective")
    assert_same_steps(metrics(rig.completed("selective_3", *recomputed, stage=3)), expected)


def test_a_moving_reference_gives_the_same_steps(rig: Rig) -> None:
    """Also where a rank dies in an update, and the sharded run is resumed on as many ranks."""
    keys = (
        "--reference.update_every",
        "4",
        "--train.checkpoint_every",
        "3",
        "--reference.max_tokens_per_batch",
    )
    expected = metrics(rig.completed("moving_alone", *keys, "64", world_size=1, stage=None))
    sharded = (*keys, "64", "--reference.flush_every_seconds", "0")
    assert set(rig.run("moving", *sharded, stage=3, before=DIE_IN_UPDATE).statuses) != {0}
    assert_same_steps(metrics(rig.completed("moving", *sharded, stage=3)), expected)


DIE_IN_UPDATE = """
import os, signal
from dpo.reference import fill
plain, calls = fill._rows, []
def rows(*given, **options):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*given, **options)
fill._rows = rows
"""


def assert_same_steps(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """The same numbers of steps and evaluations, to float tolerance."""
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name in ("step", "train/learning_rate", "train/epoch", "train/num_tokens"):
            assert ours.get(name) == theirs.get(name)
        for name in ours.keys() - {"train/rewards/accuracies", "eval/rewards/accuracies"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=2e-6), (ours["step"], name)


SLOW = """
import time
from dpo.engine.engine import Engine
plain = Engine.score
def slowly(self, *rest, **options):
    time.sleep(0.05)
    return plain(self, *rest, **options)
if __import__("os").environ["RANK"] == "1":
    Engine.score = slowly
"""


def test_a_straggler_is_named(rig: Rig) -> None:
    run_dir = rig.completed("slow", before=SLOW)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "perf/slowest_rank" in line]
    assert len(found) == STEPS
    assert [line["perf/slowest_rank"] for line in found[1:]] == [1] * (STEPS - 1)
    assert all(0.3 < line["perf/rank_time_excess"] <= 1 for line in found[1:])
