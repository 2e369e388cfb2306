"""A reference that moves: laws 1, 2, 4 (the budget) and 5 across updates, and what an update leaves."""

import copy
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812  (the field's name for it)
from torch import Tensor, nn
from unit.train.runs import STEPS, KilledError, Trained, changed

from dpo.config import Config, LoraConfig, LossConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import BatchPlan
from dpo.data.records import TokenIds
from dpo.engine.engine import Engine
from dpo.errors import StoppedBySignal, UserError
from dpo.guards.guard import Guard
from dpo.model.load import load_model
from dpo.reference.shards import read_shard
from dpo.reference.store import ReferenceStore
from dpo.reference.window import sequences_of
from dpo.train.moving_reference import note_of_updates, num_updates
from dpo.train.session import Session

EVERY = 2
Open = Callable[[Config], TokenizedDataset]


@pytest.fixture
def moving(experiment: Config) -> Config:
    """Six steps; after the second and the fourth the policy becomes the reference. Every batch is a shard."""
    options = replace(
        experiment.reference, update_every=EVERY, flush_every_seconds=0, max_tokens_per_batch=40
    )
    return replace(experiment, reference=options)


def stores(config: Config) -> list[ReferenceStore]:
    """All caches, that of the start first."""
    found = Path(config.reference.cache_dir).glob("*/identity.json")
    return [
        ReferenceStore.at(file.parent) for file in sorted(found, key=lambda file: file.stat().st_mtime_ns)
    ]


def plan_of(config: Config, data: TokenizedDataset) -> BatchPlan:
    train = config.train
    return BatchPlan(
        data.pairs_per_group,
        seed=train.seed,
        num_epochs=train.num_epochs,
        pairs_per_step=train.pairs_per_step,
        max_steps=train.max_steps,
    )


def log_prob(model: nn.Module, prompt: TokenIds, completion: TokenIds) -> Tensor:
    """As a textbook has it: one row, all logits."""
    ids = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64))[None]
    logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return logps[len(prompt) - 1 :].sum()


def test_training_equals_a_textbook_loop_that_copies_its_policy(
    moving: Config, run: Trained, open_data: Open
) -> None:
    trained = run(moving)
    data, policy = open_data(moving), load_model(moving.model)
    plan, optimizer = plan_of(moving, data), torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0)
    reference = copy.deepcopy(policy)
    for number, line in enumerate(trained.lines(), start=1):
        losses = []
        for group in (data[int(index)] for index in plan.step(number).groups):
            for chosen, rejected in group.pairs:
                of_policy, of_reference = (
                    [log_prob(model, group.prompt, group.completions[side]) for side in (chosen, rejected)]
                    for model in (policy, reference)
                )
                gains = [one - other.detach() for one, other in zip(of_policy, of_reference, strict=True)]
                losses.append(-F.logsigmoid(moving.loss.beta * (gains[0] - gains[1])))
        loss = torch.stack(losses).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        assert line["train/loss"] == pytest.approx(loss.item(), abs=5e-6)
        assert line["train/grad_norm"] == pytest.approx(float(norm), rel=1e-3)
        if number % EVERY == 0:
            reference = copy.deepcopy(policy)
    assert number == STEPS
    still = run(changed(replace(moving, reference=replace(moving.reference, update_every=0)), "still"))
    assert abs(still.curve("train/loss")[-1] - trained.curve("train/loss")[-1]) > 1e-3


@pytest.mark.parametrize(
    ("loss", "token_logps", "lora"),
    [
        ({}, False, None),
        ({"ld_alpha": 0.5}, True, None),
        ({}, False, LoraConfig(rank=2, alpha=8.0)),
    ],
    ids=["sequences", "tokens", "adapter"],
)
def test_after_an_update_the_loss_is_ln_2_again(
    moving: Config, run: Trained, open_data: Open, loss: dict[str, Any], token_logps: bool, lora: Any
) -> None:
    config = replace(
        changed(moving, "ln2", learning_rate=5e-3),
        loss=LossConfig(**loss),
        model=replace(moving.model, lora=lora),
        reference=replace(moving.reference, store_token_logps=token_logps),
    )
    data = open_data(config)
    start = np.full(int(data.completion_tokens.sum()), -2.0) if token_logps else None
    trained = run(config, reference=start)
    for step in (3, 5):
        assert trained.curve("train/loss")[step - 1] == pytest.approx(math.log(2), abs=1e-6)
        assert trained.curve("train/rewards/margins")[step - 1] == pytest.approx(0, abs=2e-6)
    assert abs(trained.curve("train/loss")[3] - math.log(2)) > 1e-3
    second = stores(config)[-1].identity
    assert bool(second.adapter) == (lora is not None)
    assert (second.weights == stores(config)[0].identity.weights) == (lora is not None)


def test_an_update_scores_what_comes_until_the_next_and_nothing_else(
    moving: Config, run: Trained, open_data: Open
) -> None:
    run(moving)
    data, plan, (_, *moved) = open_data(moving), plan_of(moving, open_data(moving)), stores(moving)
    assert [len(store.load()) for store in moved] == [
        len(
            {
                key.tobytes()
                for number in steps
                for group in plan.step(number).groups
                for key in _keys(data, group)
            }
        )
        for steps in ((3, 4), (5, 6))
    ]
    assert (Path(moving.run_dir) / "moved_reference" / "model.safetensors").is_file()


def _keys(data: TokenizedDataset, group: int) -> np.ndarray:
    first = data.first_sequence[group]
    return data.keys[first : first + data.sequences_per_group[group]]


def test_no_model_is_loaded_and_the_budget_changes_no_result(
    moving: Config, run: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = run(changed(moving, "small"))
    monkeypatch.setattr("dpo.reference.precompute.frozen_scorer", None)
    large = replace(moving.reference, max_tokens_per_batch=4096, cache_dir=moving.reference.cache_dir)
    for store in stores(moving)[1:]:
        shutil.rmtree(store.path)
    other = run(changed(replace(moving, reference=large), "large", max_tokens_per_micro_batch=4096))
    assert other.curve("train/loss") == pytest.approx(small.curve("train/loss"), abs=2e-6)


class Killer:
    """Ends the run at a point of the first update."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
        self.passes, self.point, self.armed = 0, point, True
        plain_export, plain_score, plain_update = Session.export, Engine.score_only, Session.move_reference

        def export(session: Session, *arguments: Any) -> None:
            plain_export(session, *arguments)
            self._at("snapshot")

        def score_only(engine: Engine, *arguments: Any, **options: Any) -> Tensor:
            self.passes += 1
            if self.passes == 3:
                self._at("third batch")
            return plain_score(engine, *arguments, **options)

        def move(session: Session) -> None:
            plain_update(session)
            self._at("end of the update")

        monkeypatch.setattr(Session, "export", export)
        monkeypatch.setattr(Engine, "score_only", score_only)
        monkeypatch.setattr(Session, "move_reference", move)

    def _at(self, point: str) -> None:
        if self.armed and point == self.point:
            self.armed = False
            raise KilledError


@pytest.mark.parametrize(
    ("point", "checkpoint_every"),
    [
        ("snapshot", 2),
        ("third batch", 2),
        ("third batch", 1),
        ("end of the update", 1),
        ("step 3", 2),
        ("step 4", 1),
        ("step 5", 3),
    ],
)
def test_killed_anywhere_the_same_command_ends_with_the_same_bytes(
    moving: Config, run: Trained, monkeypatch: pytest.MonkeyPatch, point: str, checkpoint_every: int
) -> None:
    options = {"checkpoint_every": checkpoint_every, "evaluate_every": 1}
    whole = run(changed(moving, "whole", **options), evaluation=float)
    values = _of_caches(moving)
    for store in stores(moving)[1:]:
        shutil.rmtree(store.path)
    config = changed(moving, "killed", **options)
    die_at = int(point[-1]) if point.startswith("step") else None
    with monkeypatch.context() as patched:
        Killer(patched, point)
        with pytest.raises(KilledError):
            run(config, evaluation=float, die_at=die_at)
    resumed = run(config, evaluation=float)
    assert resumed.lines() == whole.lines()
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name
    assert _of_caches(moving) == values


def _of_caches(config: Config) -> dict[str, dict[bytes, float]]:
    """Every value that updates have written, by identity and key."""
    found: dict[str, dict[bytes, float]] = {}
    for store in stores(config)[1:]:
        of_store = found.setdefault(store.identity.digest, {})
        for path in store.shards():
            rows = read_shard(path, store.identity.digest)
            of_store |= {key.tobytes(): float(logp) for key, logp in zip(rows.keys, rows.logps, strict=True)}
    return found


def test_a_signal_during_an_update_leaves_a_checkpoint_and_the_run_ends_the_same(
    moving: Config, run: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(changed(moving, "whole"))
    for store in stores(moving)[1:]:
        shutil.rmtree(store.path)
    config, plain = changed(moving, "stopped"), Guard.may_continue

    def may_continue(guard: Guard, doing: str) -> None:
        if doing == "updating the reference":
            os.kill(os.getpid(), signal.SIGTERM)
        plain(guard, doing)

    with monkeypatch.context() as patched:
        patched.setattr(Guard, "may_continue", may_continue)
        with pytest.raises(StoppedBySignal, match="checkpoint of step 2"):
            run(config)
    resumed = run(config)
    assert resumed.lines() == whole.lines()
    assert all(torch.equal(resumed.weights[name], weight) for name, weight in whole.weights.items())


@pytest.mark.parametrize("damage", ["gone", "pruned", "rebuilt"])
def test_a_run_does_not_go_on_with_other_values_than_it_began_with(
    moving: Config, run: Trained, damage: str
) -> None:
    config = changed(moving, "damaged", checkpoint_every=1, evaluate_every=1)
    with pytest.raises(KilledError):
        run(config, evaluation=float, die_at=4)
    moved = stores(moving)[-1]
    if damage == "gone":
        shutil.rmtree(moved.path)
    for path in moved.shards():
        rows = read_shard(path, moved.identity.digest)
        path.unlink()
        if damage == "rebuilt":
            moved.append(replace(rows, logps=rows.logps + 1e-6))
    expected = {"gone": "is not there", "pruned": "lacks", "rebuilt": "trained with other values"}[damage]
    with pytest.raises(UserError, match=expected):
        run(config, evaluation=float)


def test_what_a_checkpoint_says_of_the_reference(moving: Config, run: Trained) -> None:
    trained = run(changed(moving, "says", checkpoint_every=1, keep_last=9))
    found = [
        json.loads((trained.folder / "checkpoints" / f"step_{step:08d}" / "progress.json").read_text())
        for step in range(1, STEPS + 1)
    ]
    # A checkpoint of an update's step is written before the update, which is then made again.
    assert [progress["reference_step"] for progress in found] == [0, 0, 2, 2, 4, 4]
    identities = [store.identity.digest for store in stores(moving)]
    assert [progress["reference"] for progress in found[::2]] == ["", *identities[1:]]


@pytest.mark.parametrize(
    ("every", "num_steps", "times"), [(0, 9, 0), (2, 6, 2), (2, 7, 3), (6, 6, 0), (7, 6, 0), (1, 3, 2)]
)
def test_the_reference_does_not_move_after_the_last_step(every: int, num_steps: int, times: int) -> None:
    assert num_updates(every, num_steps) == times
    if every:
        assert ("never moves" in note_of_updates(every, num_steps)) == (times == 0)


def test_sequences_are_those_of_the_steps_each_once_in_the_order_of_their_keys(
    moving: Config, open_data: Open
) -> None:
    data = open_data(moving)
    sequences = sequences_of(data, plan_of(moving, data), range(1, STEPS + 1))
    keys = [data.keys[index].tobytes() for index in sequences]
    assert len(set(keys)) == len(keys) == len({key.tobytes() for key in data.keys})
