"""What a session does besides steps: descriptions for people, and exports that fail in one line."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from dpo.config import Config, LossConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import BatchPlan
from dpo.data.preference_data import preference_data
from dpo.engine import world
from dpo.engine.engine import Engine
from dpo.errors import UserError
from dpo.guards.guard import Guard
from dpo.model.load import load_model
from dpo.tracking.run_folder import RunFolder
from dpo.train import session as session_module
from dpo.train.checkpoint import Progress
from dpo.train.preference_objective import PreferenceObjective
from dpo.train.resume import Settings
from dpo.train.session import GROUPS_SHOWN, Session


@pytest.fixture
def session(
    make_config: Callable[..., Config],
    open_data: Callable[[Config], TokenizedDataset],
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., list[dict[str, Any]]],
    tokenizer: PreTrainedTokenizerFast,
) -> Session:
    config = make_config(write_jsonl(preference_rows(12)))
    data, folder = open_data(config), RunFolder(Path(config.run_dir))
    return Session(
        folder=folder,
        settings=Settings({"run_dir": config.run_dir}),
        model=config.model,
        options=config.train,
        engine=Engine(world.start(config.model), load_model(config.model), config.model, config.train),
        objective=PreferenceObjective(
            data=preference_data(data, np.zeros(len(data.keys))), loss_config=LossConfig(), dtype="float32"
        ),
        plan=BatchPlan(data.pairs_per_group, seed=0, num_epochs=1, pairs_per_step=64, max_steps=None),
        tokenizer=tokenizer,
        description="data",
        guard=Guard(folder, "train", 60),
    )


def test_groups_are_described_by_number_and_prompt(session: Session) -> None:
    said = session.describe([3, 5])
    assert said.startswith("data.train groups 3 ('3 ")
    assert ", 5 ('5 " in said
    assert "and 2 more" in session.describe(list(range(GROUPS_SHOWN + 2)))


def test_opening_claims_the_folder_and_knows_the_work_of_each_group(session: Session) -> None:
    with session.opened():
        assert session.folder.config.is_file()
        assert session.folder.environment.is_file()
        assert session.group_flops is not None
        assert len(session.group_flops) == len(session.objective.dataset)
        assert session.peak_flops is None  # of a CPU nothing is known


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("wanted", [False, True])
def test_masters_are_dithered_once_by_the_seed_and_never_after_a_resume(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: bool, resumed: bool
) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(session.engine, "dither", seeds.append)
    monkeypatch.setattr(session_module, "load_checkpoint", lambda engine, checkpoint, state: Progress())
    session.options = replace(session.options, seed=7, dither_masters=wanted)
    session.checkpoint = tmp_path if resumed else None
    with session.opened():
        assert seeds == ([7] if wanted and not resumed else [])


def test_an_export_that_fails_is_one_line_for_the_user(
    session: Session, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(session_module, "export_trained", full)
    with pytest.raises(UserError, match=r"model.*No space left"):
        session.export(tmp_path / "model")


def test_an_export_is_a_model_with_its_card(session: Session, tmp_path: Path) -> None:
    session.card = lambda results: f"# results {sorted(results)}"
    session.evaluated = {"eval/loss": 0.5}
    session.export(tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text() == "# results ['eval/loss']"
    assert load_model(session.model.__class__(name_or_path=str(tmp_path / "model"))) is not None
