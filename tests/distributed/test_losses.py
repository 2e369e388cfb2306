"""Law 4 for every loss, and one cache for all of them: ranks and micro-batches are invisible."""

import json
import math
import socket
from pathlib import Path

import pytest
from loss_ranks import BUDGETS, STEPS, SWEEP, sweep, write_scored
from ranks import FORKS, wait

Steps = list[dict[str, float]]
Both = tuple[dict[str, Steps], dict[str, Steps]]

COMPARED = ("loss", "grad_norm", "rewards/margins", "rewards/chosen", "logps/chosen", "num_tokens")


def measured(folder: Path, model: Path, world_size: int) -> dict[str, Steps]:
    """Loss and budget -> the metrics of its steps, on real ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    out = folder / f"ranks{world_size}.json"
    processes = []
    for rank in range(world_size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
        }
        given = (environment if world_size > 1 else {}, folder, model, out)
        processes.append(FORKS.Process(target=sweep, args=given))
        processes[-1].start()
    assert wait(processes, 240) == [0] * world_size
    found: dict[str, Steps] = json.loads(out.read_text())
    return found


@pytest.fixture(scope="module")
def both(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> tuple[dict[str, Steps], dict[str, Steps]]:
    """The same sweep on one rank and on two; the second finds the first one's cache."""
    folder = tmp_path_factory.mktemp("losses")
    write_scored(folder)
    return measured(folder, tiny_model, 1), measured(folder, tiny_model, 2)


@pytest.mark.parametrize("name", sorted(SWEEP))
def test_ranks_and_micro_batches_change_nothing(both: Both, name: str) -> None:
    alone, together = both
    expected = alone[f"{name}, {BUDGETS[-1]}"]
    assert len(expected) == STEPS
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 1e-4 for step in expected)
    for found in (alone[f"{name}, {BUDGETS[0]}"], *(together[f"{name}, {budget}"] for budget in BUDGETS)):
        for ours, theirs in zip(found, expected, strict=True):
            for key in (
                "loss",
                "grad_norm",
                "rewards/margins",
                "rewards/chosen",
                "logps/chosen",
                "num_tokens",
            ):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=2e-6), key


def test_the_losses_are_not_the_same(both: Both) -> None:
    alone, _ = both
    first = {name: alone[f"{name}, {BUDGETS[0]}"][1]["grad_norm"] for name in SWEEP}
    assert len({round(norm, 6) for norm in first.values()}) == len(SWEEP)
