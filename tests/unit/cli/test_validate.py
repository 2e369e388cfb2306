"""Every illegal value is named with its key, all of them at once, without touching a model or data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpo.cli.validate import problems
from dpo.config import (
    Config,
    DataConfig,
    DataSource,
    LoraConfig,
    ModelConfig,
    ScratchConfig,
    SftConfig,
    SftModelConfig,
    SftTrainConfig,
)

CONFIG = Config(model=ModelConfig(name_or_path="m"), data=DataConfig(train="d"))
SFT = SftConfig(model=SftModelConfig(name_or_path="m"), data=DataConfig(train="d"))


def with_value(config: Any, key: str, value: Any) -> Any:
    section, name = key.split(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def test_defaults_are_legal() -> None:
    assert problems(CONFIG) == []
    assert problems(SFT) == []


def test_defaults_are_the_papers() -> None:
    # Appendix B of arXiv 2305.18290: beta 0.1, batch 64, RMSprop or Adam at 1e-6, 150 steps of warm-up.
    assert (CONFIG.loss.beta, CONFIG.train.pairs_per_step) == (0.1, 64)
    assert (CONFIG.train.learning_rate, CONFIG.train.warmup_steps) == (1e-6, 150)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.name_or_path", ""),
        ("data.train", ""),
        ("data.train", []),
        ("data.max_length", 1),
        ("data.max_prompt_length", 0),
        ("data.min_margin", -0.1),
        ("loss.beta", 0.0),
        ("loss.beta", -0.1),
        ("loss.beta", float("nan")),
        ("loss.label_smoothing", 0.5),
        ("loss.label_smoothing", -0.1),
        ("train.pairs_per_step", 0),
        ("train.learning_rate", 0.0),
        ("train.learning_rate", float("nan")),
        ("train.warmup_steps", -1),
        ("train.warmup_ratio", 1.0),
        ("train.min_learning_rate", -1e-7),
        ("train.min_learning_rate", 1e-7),  # of a constant schedule
        ("train.adam_epsilon", 0.0),
        ("train.weight_decay", -0.1),
        ("train.max_grad_norm", -1.0),
        ("train.max_grad_norm", float("nan")),
        ("train.num_epochs", 0),
        ("train.max_steps", 0),
        ("train.max_tokens_per_micro_batch", 1),
        ("train.seed", -1),
        ("train.evaluate_every", -1),
        ("train.checkpoint_every", -1),
        ("train.keep_last", 0),
        ("train.adam_betas", (0.9, 1.0)),
        ("train.adam_betas", (-0.1, 0.9)),
        ("train.resume", "yes"),
        ("reference.max_tokens_per_batch", 1),
        ("reference.audit_rows", -1),
        ("reference.flush_every_seconds", -1.0),
        ("reference.flush_every_seconds", float("nan")),
        ("evaluate.num_prompts", -1),
        ("evaluate.completion_tokens", 0),
        ("evaluate.temperature", -0.5),
        ("evaluate.batch_size", 0),
        ("evaluate.seed", -1),
        ("evaluate.table_rows", -1),
        ("evaluate.scorer", "siebert"),
        ("evaluate.scorer", "judge:m@http://x"),
        ("evaluate.judge", "mine"),
        ("evaluate.judge", "@http://x"),
        ("evaluate.judge_rubric", "no/such/file"),
    ],
)
def test_an_illegal_value_is_named_with_its_key(key: str, value: Any) -> None:
    (problem,) = problems(with_value(CONFIG, key, value))
    assert problem.startswith(f"{key}: ")


def test_a_mirror_needs_checkpoints_and_a_run_that_resumes() -> None:
    mirrored = with_value(CONFIG, "train.mirror", "s3://bucket/run")
    (problem,) = problems(mirrored)
    assert problem.startswith("train.mirror: s3://bucket/run; checkpoints are copied there: set train.check")
    regular = with_value(mirrored, "train.checkpoint_every", 10)
    assert problems(regular) == []
    (problem,) = problems(with_value(regular, "train.resume", "never"))
    assert problem.endswith("a run is resumed from there, and train.resume is never")


def test_a_schedule_that_makes_no_sense_is_refused() -> None:
    decaying = with_value(CONFIG, "train.schedule", "cosine")
    assert problems(with_value(decaying, "train.min_learning_rate", 1e-6)) == []
    (problem,) = problems(with_value(decaying, "train.min_learning_rate", 2e-6))
    assert problem == "train.min_learning_rate: 2e-06; expected at most train.learning_rate, 1e-06"
    by_ratio = with_value(CONFIG, "train.warmup_ratio", 0.1)
    assert problems(by_ratio) == []
    (problem,) = problems(with_value(by_ratio, "train.warmup_steps", 10))
    assert problem == "train.warmup_ratio: 0.1; train.warmup_steps is given too: leave one out"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss.label_smoothing", 0.0),
        ("loss.label_smoothing", 0.49),
        ("train.max_grad_norm", 0.0),
        ("train.max_steps", 1),
        ("train.adam_betas", (0.0, 0.0)),
        ("train.resume", "never"),
        ("data.max_length", 2),
        ("data.max_prompt_length", 1),
        ("reference.audit_rows", 0),
        ("reference.flush_every_seconds", 0.0),
        ("reference.max_tokens_per_batch", 2),
        ("evaluate.num_prompts", 0),
        ("evaluate.temperature", 0.0),
        ("evaluate.scorer", "vader"),
        ("evaluate.scorer", "hf:org/model"),
        ("evaluate.scorer", "reward:org/model"),
        ("evaluate.scorer", "reward-plain:org/model"),
        ("evaluate.judge", "org/model@http://localhost:8000"),
    ],
)
def test_values_at_the_edge_of_the_range_are_legal(key: str, value: Any) -> None:
    assert problems(with_value(CONFIG, key, value)) == []


@pytest.mark.parametrize("key", ["train.max_tokens_per_micro_batch", "reference.max_tokens_per_batch"])
def test_a_budget_must_hold_the_longest_row(key: str) -> None:
    config = with_value(CONFIG, "data.max_length", 512)
    (problem,) = problems(with_value(config, key, 511))
    assert problem == f"{key}: 511; expected at least data.max_length, 512: the longest row must fit"
    assert problems(with_value(config, key, 512)) == []
    assert problems(with_value(config, key, None)) == []


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("loss.type", "simpo", "compares with no reference"),
        ("loss.type", "bco_pair", "averages rewards over all steps"),
        ("model.lora", LoraConfig(start="merge"), "a merged start"),
    ],
)
def test_a_moving_reference_that_cannot_work_is_refused(key: str, value: Any, reason: str) -> None:
    moving = with_value(CONFIG, "reference.update_every", 100)
    assert problems(moving) == []
    (problem,) = problems(with_value(moving, key, value))
    assert problem.startswith("reference.update_every: 100; ")
    assert reason in problem
    assert problems(with_value(CONFIG, key, value)) == []


def test_a_moving_reference_of_an_adapter_needs_a_base_that_it_can_name() -> None:
    config = with_value(with_value(CONFIG, "model.lora", LoraConfig()), "reference.update_every", 100)
    assert problems(config) == []
    (problem,) = problems(with_value(config, "model.revision", "v2"))
    assert problem == "reference.update_every: 100; an adapter cannot name revision v2 of its base: set 0"


def test_all_problems_are_found_at_once() -> None:
    config = with_value(with_value(CONFIG, "loss.beta", 0.0), "train.seed", -1)
    config = with_value(config, "evaluate.batch_size", 0)
    assert sorted(problem.split(":")[0] for problem in problems(config)) == [
        "evaluate.batch_size",
        "loss.beta",
        "train.seed",
    ]


def test_a_prompt_as_long_as_everything_leaves_no_room_for_a_completion() -> None:
    config = with_value(with_value(CONFIG, "data.max_length", 8), "data.max_prompt_length", 8)
    (problem,) = problems(config)
    assert "data.max_prompt_length: 8" in problem
    assert problems(with_value(config, "data.max_prompt_length", 7)) == []


def test_a_weight_of_a_mixture_is_named_by_its_place() -> None:
    sources = [DataSource(path="a"), DataSource(path="b", weight=0.0)]
    (problem,) = problems(with_value(CONFIG, "data.train", sources))
    assert problem.startswith("data.train[1].weight: 0.0")


def test_resume_takes_the_folder_of_a_checkpoint(tmp_path: Path) -> None:
    assert problems(with_value(CONFIG, "train.resume", str(tmp_path))) == []


def test_sft_wants_a_model_or_the_plan_of_one_but_not_both(tmp_path: Path) -> None:
    plan = tmp_path / "config.json"
    plan.write_text("{}")
    scratch = ScratchConfig(config=str(plan))
    assert problems(replace(SFT, model=SftModelConfig(scratch=scratch))) == []
    for model in (SftModelConfig(), SftModelConfig(name_or_path="m", scratch=scratch)):
        (problem,) = problems(replace(SFT, model=model))
        assert "exactly one of model.name_or_path and model.scratch" in problem


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.train", ""), ("data.train", []), ("data.max_length", 1), ("data.min_margin", -0.1)],
)
def test_sft_names_illegal_values_of_its_data(key: str, value: Any) -> None:
    (problem,) = problems(with_value(SFT, key, value))
    assert problem.startswith(f"{key}: ")


def test_sft_names_its_own_illegal_values(tmp_path: Path) -> None:
    missing = SftModelConfig(scratch=ScratchConfig(config=str(tmp_path / "none.json")))
    config = replace(SFT, model=missing, train=SftTrainConfig(sequences_per_step=0))
    assert sorted(problem.split(":")[0] for problem in problems(config)) == [
        "model.scratch.config",
        "train.sequences_per_step",
    ]


def test_a_compiled_model_is_not_recomputed_in_part() -> None:
    compiled = with_value(CONFIG, "model.compile", True)
    (problem,) = problems(with_value(compiled, "model.gradient_checkpointing", "selective"))
    assert problem.startswith("model.compile: true; selective recomputation")
    assert problems(with_value(compiled, "model.gradient_checkpointing", "full")) == []


def test_a_balancing_loss_needs_the_whole_step() -> None:
    balanced = with_value(CONFIG, "model.router_aux_loss_weight", 0.01)
    assert problems(balanced) == []
    (problem,) = problems(with_value(balanced, "train.backward", "direct"))
    assert problem.startswith("train.backward: direct; model.router_aux_loss_weight balances the whole step")
    (problem,) = problems(with_value(CONFIG, "model.router_aux_loss_weight", -1.0))
    assert problem == "model.router_aux_loss_weight: -1.0; expected a number of at least 0"
