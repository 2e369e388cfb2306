"""Fixtures that train a tiny model."""

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from unit.train.runs import OPTIONS, KilledError, Run, WithoutExport

from dpo.commands.settings import settings_of
from dpo.config import Config
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import BatchPlan
from dpo.data.preference_data import preference_data
from dpo.engine import world
from dpo.engine.engine import Engine
from dpo.guards.guard import Guard
from dpo.loss.catalog import averaged_over_groups
from dpo.model.load import DTYPES
from dpo.model.lora import load_policy
from dpo.reference.identity import reference_identity
from dpo.reference.precompute import precompute
from dpo.reference.store import ReferenceStore
from dpo.reference.values import reference_logps
from dpo.tracking.metrics import Evaluation, MetricSums
from dpo.tracking.run_folder import RunFolder
from dpo.train import loop
from dpo.train.loop import train
from dpo.train.moving_reference import MovingReference
from dpo.train.preference_objective import PreferenceObjective
from dpo.train.session import Session
from dpo.train.setup import start_of


@pytest.fixture
def experiment(
    make_config: Callable[..., Config],
    open_data: Callable[[Config], TokenizedDataset],
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., list[dict[str, Any]]],
) -> Config:
    """An experiment of 12 groups, with its cache filled."""
    config = make_config(write_jsonl(preference_rows(12)), **OPTIONS)
    root = Path(config.reference.cache_dir)
    store = ReferenceStore(root, reference_identity(config.model, root))
    precompute(config.model, config.reference, [open_data(config)], store)
    return config


@pytest.fixture
def run(
    open_data: Callable[[Config], TokenizedDataset], tokenizer: PreTrainedTokenizerFast
) -> Callable[..., Run]:
    """Trains as `dpo train` does, from the start or from a checkpoint.

    `evaluation` gives the held-out loss of a step; `die_at` is the step whose evaluation raises KilledError,
    `stop_at` the one in which a signal arrives, `no_room_at` the one whose model cannot be written.
    """

    def run_it(
        config: Config,
        *,
        evaluation: Callable[[int], float] | None = None,
        die_at: int | None = None,
        stop_at: int | None = None,
        no_room_at: int | None = None,
        reference: np.ndarray | None = None,
    ) -> Run:
        checkpoint = start_of(RunFolder(Path(config.run_dir)), settings_of(config), config.train)
        data, root = open_data(config), Path(config.reference.cache_dir)
        if reference is None:
            store = ReferenceStore(root, reference_identity(config.model, root))
            reference = reference_logps([data], store, "command")[0]
        objective = PreferenceObjective(
            data=preference_data(
                data,
                reference,
                by_margin=config.loss.pair_weights == "score_margin",
                over_groups=averaged_over_groups(config.loss),
            ),
            loss_config=config.loss,
            dtype="float32",
        )
        plan = BatchPlan(
            data.pairs_per_group,
            seed=config.train.seed,
            num_epochs=config.train.num_epochs,
            pairs_per_step=config.train.pairs_per_step,
            max_steps=config.train.max_steps,
        )
        accelerator = world.start(config.model)
        model = load_policy(config.model, dtype=DTYPES[config.model.dtype], seed=config.train.seed)
        result = Run(Path(config.run_dir))

        def evaluate(session: Session) -> Evaluation:
            step = session.progress.step
            if die_at is not None and step == die_at:
                raise KilledError
            if stop_at is not None and step == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
                session.guard.may_continue("evaluation")
            assert evaluation is not None
            return Evaluation(values={"eval/loss": evaluation(step)})

        folder = RunFolder(result.folder)
        moving = MovingReference(
            objective=objective,
            plan=plan,
            model=config.model,
            options=config.reference,
            folder=folder.moved_reference,
        )
        session = WithoutExport(
            folder=folder,
            moving_reference=moving if config.reference.update_every else None,
            settings=settings_of(config),
            model=config.model,
            options=config.train,
            engine=Engine(accelerator, model, config.model, config.train),
            objective=objective,
            plan=plan,
            tokenizer=tokenizer,
            description="data",
            guard=Guard(folder, "train", 60),
            evaluate=evaluate if evaluation else None,
            checkpoint=checkpoint,
        )
        session.exported, session.no_room_at = result.exported, no_room_at
        with session.guard, session.opened():
            result.evaluated = train(session)
            session.finish_mirror()
        result.weights = session.engine.weights()
        return result

    return run_it


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the loss of these steps not finite: spoil({3, 4})."""

    def spoil_steps(steps: set[int], value: float = math.nan) -> None:
        made, plain = [0], loop.train_step

        def counted(*arguments: Any) -> Any:
            made[0] = arguments[0].progress.step + 1
            return plain(*arguments)

        honest = PreferenceObjective.loss

        def spoiled(self: PreferenceObjective, logps: Tensor, batch: Any, sums: MetricSums) -> Tensor:
            loss = honest(self, logps, batch, sums)
            return loss * value if made[0] in steps else loss

        monkeypatch.setattr(loop, "train_step", counted)
        monkeypatch.setattr(PreferenceObjective, "loss", spoiled)

    return spoil_steps
