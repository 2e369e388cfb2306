"""The loop on one device and a tiny model: laws 1, 4 (the budget) and 5, and what it records and keeps.

More ranks and DeepSpeed are the business of tests/distributed.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from unit.train.runs import STEPS, KilledError, Run, Trained, changed

from dpo.config import Config, LossConfig, OptimizationConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.preference_data import preference_data
from dpo.data.trees import sequence_batch
from dpo.engine.optimizer import OPTIMIZERS
from dpo.errors import StoppedBySignal, UserError
from dpo.model.load import load_model
from dpo.tracking.metrics import MetricSums
from dpo.train.checkpoint import Progress
from dpo.train.loop import due_actions
from dpo.train.preference_objective import PreferenceObjective


@pytest.mark.parametrize("beta", [0.05, 0.1])
def test_the_first_loss_is_ln_2_and_all_rewards_are_zero(
    experiment: Config, run: Trained, beta: float
) -> None:
    config = replace(changed(experiment, "first", max_steps=1), loss=LossConfig(beta=beta))
    (line,) = run(config).lines()
    assert line["train/loss"] == pytest.approx(math.log(2), rel=0, abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert line[f"train/{name}"] == pytest.approx(0, abs=2e-6)
    assert line["train/rewards/accuracies"] == 0.5


def test_training_lowers_the_loss_and_raises_the_margin(experiment: Config, run: Trained) -> None:
    config = changed(experiment, "learns", num_epochs=10, max_steps=None)
    trained = run(config)
    assert trained.curve("train/loss")[-1] < 0.3 < trained.curve("train/loss")[0]
    assert trained.curve("train/rewards/margins")[-1] > 1
    assert trained.curve("train/rewards/accuracies")[-1] == 1.0


def test_the_micro_batch_budget_changes_no_result(experiment: Config, run: Trained) -> None:
    many = run(changed(experiment, "many", max_tokens_per_micro_batch=40))
    one = run(changed(experiment, "one", max_tokens_per_micro_batch=100_000))
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert many.curve(f"train/{name}") == pytest.approx(one.curve(f"train/{name}"), rel=1e-5, abs=1e-6)
    assert many.curve("train/loss") == pytest.approx(one.curve("train/loss"), rel=0, abs=1e-6)
    assert many.curve("train/grad_norm") == pytest.approx(one.curve("train/grad_norm"), rel=1e-4)
    for name in ("train/learning_rate", "train/epoch", "train/num_tokens"):
        assert many.curve(name) == one.curve(name)


def test_the_cache_trains_as_a_live_reference_does(
    experiment: Config, run: Trained, open_data: Callable[[Config], TokenizedDataset]
) -> None:
    data, model = open_data(experiment), load_model(experiment.model)
    live = []
    for group in (data[index] for index in range(len(data))):
        for completion in group.completions:
            batch = sequence_batch([(group.prompt, completion)])
            with torch.no_grad():
                logps = model(input_ids=batch.input_ids).logits[0, batch.predicts].double().log_softmax(-1)
            live.append(float(logps.gather(1, batch.targets[:, None]).sum()))
    from_cache = run(changed(experiment, "cache"))
    from_live = run(changed(experiment, "live"), reference=np.array(live))
    assert from_cache.curve("train/loss") == pytest.approx(from_live.curve("train/loss"), abs=5e-6)
    assert from_cache.curve("train/grad_norm") == pytest.approx(from_live.curve("train/grad_norm"), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize(
    ("optimizer", "die_at"), [("adamw", 3), *((optimizer, 4) for optimizer in OPTIMIZERS)]
)
def test_a_killed_and_resumed_run_ends_as_one_that_never_was(
    experiment: Config, run: Trained, optimizer: str, die_at: int
) -> None:
    options = {"checkpoint_every": 2, "evaluate_every": 1, "optimizer": optimizer, "schedule": "cosine"}
    options |= {"min_learning_rate": 1e-4, "warmup_ratio": 0.3}
    whole = run(changed(experiment, "whole", **options), evaluation=lambda step: 1 / (step + 1))
    config = changed(experiment, "killed", **options)
    with pytest.raises(KilledError):  # after a checkpoint, and at 4 just before the next one
        run(config, evaluation=lambda step: 1 / (step + 1), die_at=die_at)
    resumed = run(config, evaluation=lambda step: 1 / (step + 1))
    assert resumed.lines() == whole.lines()
    assert resumed.weights.keys() == whole.weights.keys()
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


def test_a_finished_run_that_is_started_again_trains_nothing(experiment: Config, run: Trained) -> None:
    config = changed(experiment, "twice", checkpoint_every=2)
    first = run(config)
    again = run(config)
    assert again.lines(timing=True) == first.lines(timing=True)
    for name, weight in first.weights.items():
        assert torch.equal(again.weights[name], weight)


def test_every_step_is_recorded_with_all_its_numbers(experiment: Config, run: Trained) -> None:
    lines = run(changed(experiment, "names")).lines(timing=True)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    rewards = {f"train/rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    logps = {"train/logps/chosen", "train/logps/rejected"}
    own = {f"train/{name}" for name in ("loss", "grad_norm", "learning_rate", "epoch", "num_tokens")}
    timing = {"tokens_per_second", "pairs_per_second", "data_wait_fraction", "padding_fraction"}
    named = rewards | logps | own | {f"perf/{name}" for name in (*timing, "peak_memory_gb")}
    for line in lines:
        assert line.keys() - {"step"} >= named
        assert line["train/rewards/margins"] == pytest.approx(
            line["train/rewards/chosen"] - line["train/rewards/rejected"], abs=1e-9
        )
        assert 0 <= line["perf/padding_fraction"] < 1


def test_tokens_are_counted_without_padding_over_the_whole_run(
    experiment: Config, run: Trained, open_data: Callable[[Config], TokenizedDataset]
) -> None:
    data = open_data(experiment)
    config = changed(experiment, "epoch", num_epochs=2, max_steps=None)
    each_epoch = sum(
        len(data[g].prompt) + sum(map(len, data[g].completions)) for g in range(len(data))
    )  # a prompt is computed once
    trained = run(config)
    assert trained.curve("train/num_tokens")[-1] == 2 * each_epoch
    assert trained.curve("train/epoch")[-1] == 2.0


def test_threads_change_no_bit(
    make_config: Callable[..., Config],
    write_jsonl: Callable[..., str],
    run: Trained,
) -> None:
    """Law 5 with 2 threads: completions of one prompt share the state that predicts their first token."""
    rng = np.random.default_rng(0)
    words = ("good", "bad", "day", "cat", "film", "well")
    rows = [
        {
            "prompt": f"{number} the",
            "completions": [f" {' '.join(rng.choice(words, 9))} {other}" for other in range(4)],
            "pairs": [{"chosen": 0, "rejected": other} for other in (1, 2, 3)],
        }
        for number in range(24)
    ]
    options = {"pairs_per_step": 72, "max_steps": 2, "num_epochs": 2, "max_tokens_per_micro_batch": 8192}
    config = make_config(write_jsonl(rows), **options, learning_rate=1e-2, warmup_steps=0)
    config = replace(config, loss=LossConfig(type="simpo", beta=2.0))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [run(changed(config, f"run{n}"), reference=np.zeros(96)) for n in range(4)]
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        assert all(torch.equal(weight, runs[0].weights[name]) for name, weight in other.weights.items())


@pytest.mark.parametrize(("every", "steps"), [(0, [0, 6]), (2, [0, 2, 4, 6]), (4, [0, 4, 6])])
def test_evaluation_is_at_both_ends_and_every_so_often(
    experiment: Config, run: Trained, every: int, steps: list[int]
) -> None:
    trained = run(changed(experiment, "eval", evaluate_every=every), evaluation=float)
    assert [line["step"] for line in trained.lines() if "eval/loss" in line] == steps
    assert trained.evaluated == {"eval/loss": 6.0}


def test_the_best_weights_are_kept_each_time_the_held_out_loss_falls(
    experiment: Config, run: Trained
) -> None:
    losses = {0: 0.7, 1: 0.5, 2: 0.6, 3: 0.0, 4: 0.4, 5: 0.0, 6: 0.3}
    best = run(changed(experiment, "best", evaluate_every=1, keep_best=True), evaluation=losses.__getitem__)
    assert best.exported == [0, 1, 3]
    last = run(changed(experiment, "last", evaluate_every=1), evaluation=losses.__getitem__)
    assert last.exported == []


def test_a_resumed_run_remembers_its_best(experiment: Config, run: Trained) -> None:
    options = {"evaluate_every": 1, "keep_best": True, "checkpoint_every": 2}
    losses = {0: 0.7, 1: 0.2, 2: 0.6, 3: 0.5, 4: 0.4, 5: 0.1, 6: 0.3}
    config = changed(experiment, "best", **options)
    with pytest.raises(KilledError):
        run(config, evaluation=losses.__getitem__, die_at=3)
    assert run(config, evaluation=losses.__getitem__).exported == [5]


@pytest.mark.parametrize("kept", [{"keep_best": True}, {"snapshot_every": 4}])
def test_a_model_that_could_not_be_written_has_its_checkpoint_and_is_written_by_the_next_start(
    experiment: Config, run: Trained, kept: dict[str, Any]
) -> None:
    options = {"evaluate_every": 4, "checkpoint_every": 4, **kept}
    losses = {0: 0.7, 4: 0.2, 6: 0.6}
    config = changed(experiment, "unwritten", **options)
    with pytest.raises(UserError, match="could not be written"):
        run(config, evaluation=losses.__getitem__, no_room_at=4)
    assert [path.name for path in (Path(config.run_dir) / "checkpoints").iterdir()] == ["step_00000004"]
    assert run(config, evaluation=losses.__getitem__).exported == [4]


def test_an_older_checkpoint_of_the_run_can_be_resumed_from_and_the_newer_are_kept(
    experiment: Config, run: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(experiment, "older", checkpoint_every=2)
    whole = run(config)
    older = Path(config.run_dir) / "checkpoints" / "step_00000004"
    again = run(replace(config, train=replace(config.train, resume=str(older))))
    assert "aside_step_00000006" in capsys.readouterr().out
    assert sorted(path.name for path in older.parent.iterdir()) == [
        "aside_step_00000006",
        "step_00000004",
        "step_00000006",
    ]
    assert again.lines() == whole.lines()


def test_models_are_kept_along_the_way_and_not_again_after_a_resume(experiment: Config, run: Trained) -> None:
    config = changed(experiment, "snapshots", snapshot_every=2, checkpoint_every=3)
    with pytest.raises(KilledError):
        run(config, evaluation=float, die_at=6)
    folders = [config.run_dir + f"/snapshots/step_{step:08d}" for step in (2, 4)]
    for folder in folders:
        Path(folder).mkdir(parents=True)  # as the export leaves it
    again = run(config, evaluation=float)
    assert again.exported == [6]


def test_checkpoints_are_written_every_so_often_and_at_the_end(experiment: Config, run: Trained) -> None:
    trained = run(changed(experiment, "often", checkpoint_every=4, keep_last=9))
    names = sorted(path.name for path in (trained.folder / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000006"]
    assert not (run(changed(experiment, "never")).folder / "checkpoints").exists()


@pytest.mark.parametrize("stop_at", [0, 3, STEPS])
def test_a_run_that_is_stopped_in_an_evaluation_ends_as_one_that_never_was(
    experiment: Config, run: Trained, stop_at: int
) -> None:
    options = {"evaluate_every": 1, "schedule": "cosine"}  # a signal saves also where nothing else does
    whole = run(changed(experiment, "whole", **options), evaluation=lambda step: 1 / (step + 1))
    config = changed(experiment, "stopped", **options)
    with pytest.raises(StoppedBySignal, match="the same command"):
        run(config, evaluation=lambda step: 1 / (step + 1), stop_at=stop_at)
    assert [line["step"] for line in Run(Path(config.run_dir)).lines()][-1:] == ([stop_at] if stop_at else [])
    resumed = run(config, evaluation=lambda step: 1 / (step + 1))
    assert resumed.lines() == whole.lines()
    for name, weight in whole.weights.items():
        assert torch.equal(resumed.weights[name], weight), name


def test_nothing_waits_for_the_device_between_micro_batches(
    experiment: Config, open_data: Callable[[Config], TokenizedDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = open_data(experiment)
    objective = PreferenceObjective(
        data=preference_data(data, np.zeros(len(data.keys))), loss_config=experiment.loss, dtype="float32"
    )
    batch, sums = objective.batch(np.array([0, 1]), "packed"), MetricSums()
    logps = torch.zeros(len(batch.num_tokens), dtype=torch.float64, requires_grad=True)

    def refuse(*_: object) -> None:
        raise AssertionError("a value was read off the device")

    with monkeypatch.context() as patched:
        for name in ("item", "tolist", "__float__", "__int__", "__bool__", "numpy"):
            patched.setattr(torch.Tensor, name, refuse)
        objective.loss(logps, batch, sums).backward()
    assert sums.means()["rewards/margins"] == 0


def test_gradient_checkpointing_computes_the_same_step(experiment: Config, run: Trained) -> None:
    plain = run(changed(experiment, "plain"))
    model = replace(experiment.model, gradient_checkpointing=True)
    saving = run(changed(replace(experiment, model=model), "saving"))
    for name in ("train/loss", "train/grad_norm"):
        assert saving.curve(name) == pytest.approx(plain.curve(name), rel=1e-5)


def test_rows_and_trees_train_alike_and_trees_compute_less(experiment: Config, run: Trained) -> None:
    trees = run(changed(experiment, "trees"))
    model = replace(experiment.model, share_prompts=False)
    rows = run(changed(replace(experiment, model=model), "rows"))
    for name in ("train/loss", "train/grad_norm"):
        assert rows.curve(name) == pytest.approx(trees.curve(name), rel=1e-4, abs=1e-6)
    for step, in_rows in zip(trees.lines(timing=True), rows.lines(timing=True), strict=True):
        assert (step["perf/padding_fraction"], in_rows["perf/shared_prefix_fraction"]) == (0, 0)
        assert step["perf/shared_prefix_fraction"] > 0.1
        assert step["perf/rank_imbalance"] == 0


@pytest.mark.parametrize(
    ("options", "progress", "due"),
    [
        ({}, {"step": 0}, "evaluate"),
        ({}, {"step": 0, "evaluated_step": 0}, ""),
        ({}, {"step": 3}, ""),
        ({"evaluate_every": 3}, {"step": 3}, "evaluate"),
        ({"evaluate_every": 3}, {"step": 3, "evaluated_step": 3}, ""),
        ({"snapshot_every": 3}, {"step": 3}, "keep_snapshot"),
        ({"snapshot_every": 3}, {"step": 4}, ""),
        ({"checkpoint_every": 3}, {"step": 0, "evaluated_step": 0}, ""),
        ({"checkpoint_every": 3}, {"step": 3}, "save_checkpoint"),
        ({"checkpoint_every": 3}, {"step": 3, "skipped_in_a_row": 1}, ""),
        ({"checkpoint_every": 4}, {"step": 9, "skipped_in_a_row": 1}, "evaluate save_checkpoint finish"),
        ({}, {"step": 9}, "evaluate finish"),
        ({}, {"step": 9, "evaluated_step": 9}, "finish"),
    ],
)
def test_what_is_due_follows_from_progress_and_options_alone(
    options: dict[str, Any], progress: dict[str, Any], due: str
) -> None:
    actions = due_actions(Progress(**progress), OptimizationConfig(**options), 9)
    assert {name for name in actions.__slots__ if getattr(actions, name)} == set(due.split())
