"""A training on one device and a tiny model, for the tests of the loop and of its passes."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpo.config import Config, ModelConfig
from dpo.errors import UserError
from dpo.train.session import Session

STEPS = 6
OPTIONS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "warmup_steps": 0,
    "pairs_per_step": 8,
    "max_steps": STEPS,
    "num_epochs": 3,
    "max_tokens_per_micro_batch": 256,
    "checkpoint_async": False,  # a run that is killed at a step has its checkpoints by then
}


class KilledError(Exception):
    """Stands for whatever ends a process."""


@dataclass
class Run:
    """What a finished or killed run leaves."""

    folder: Path
    weights: dict[str, Tensor] = field(default_factory=dict)
    exported: list[int] = field(default_factory=list)
    """The steps at which the best weights were written."""
    evaluated: dict[str, float] = field(default_factory=dict)
    """What `train` returned."""

    def lines(self, *, timing: bool = False) -> list[dict[str, float]]:
        parsed = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if timing or not k.startswith("perf/")} for line in parsed]

    def curve(self, name: str) -> list[float]:
        return [line[name] for line in self.lines() if name in line]


class WithoutExport(Session):
    """Notes the steps at which a model would be written."""

    exported: list[int]
    no_room_at: int | None = None

    def export(self, target: Path, kind: ModelConfig | None = None) -> None:
        if target == self.folder.moved_reference:
            return super().export(target, kind)
        if self.progress.step == self.no_room_at:
            raise UserError(f"{target}: the model could not be written")
        return self.exported.append(self.progress.step)


Trained = Callable[..., Run]


def changed(config: Config, run_dir: str, **options: Any) -> Config:
    folder = str(Path(config.run_dir).parent / run_dir)
    return replace(config, run_dir=folder, train=replace(config.train, **options))


def assert_resumed_alike(run: Trained, config: Config, whole: Run) -> None:
    """Kills a run in its fourth step and resumes it, to the same bits as an undisturbed one."""
    with pytest.raises(KilledError):
        run(config, evaluation=float, die_at=4)
    resumed = run(config, evaluation=float)
    assert resumed.lines() == whole.lines()
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
