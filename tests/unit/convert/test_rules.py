"""From TRL's options to ours: every key is accounted for, and what is mapped is a configuration of ours."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainingArguments

from dpo.cli.parse import parse
from dpo.commands.convert import nested
from dpo.config import Config
from dpo.config.foreign import KEYS
from dpo.convert.lines import Became, Line
from dpo.convert.rules import convert

LEAST = {"model_name_or_path": "m", "dataset_name": "d"}


def parsed(folder: Path, given: dict[str, Any], num_gpus: int = 1) -> Config:
    """Our configuration, read as training reads it."""
    file = folder / "ours.yaml"
    file.write_text(yaml.safe_dump(nested(convert(LEAST | given, num_gpus))))
    config = parse("train", ["--config", str(file)])
    assert isinstance(config, Config)
    return config


def line_of(key: str, given: dict[str, Any]) -> Line:
    (found,) = [line for line in convert(given, 1) if key in line.theirs]
    return found


def test_what_a_file_does_not_say_is_trls_default_where_ours_differs(tmp_path: Path) -> None:
    config = parsed(tmp_path, {})
    assert (config.model.name_or_path, config.data.train) == ("m", "d")
    assert (config.train.schedule, config.train.warmup_steps, config.train.num_epochs) == ("linear", 0, 3)
    assert (config.train.pairs_per_step, config.train.seed) == (8, 42)
    assert (config.train.learning_rate, config.loss.beta, config.loss.type) == (1e-6, 0.1, "sigmoid")


def test_a_batch_counts_on_every_gpu_and_accumulated_pass(tmp_path: Path) -> None:
    given = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    assert parsed(tmp_path, given, num_gpus=8).train.pairs_per_step == 96


@pytest.mark.parametrize(
    ("given", "steps", "share"),
    [
        ({"warmup_steps": 30}, 30, None),
        ({"warmup_ratio": 0.0}, 0, None),
        ({"warmup_ratio": 0.05}, 150, 0.05),
        ({"warmup_steps": 0.05}, 150, 0.05),  # in transformers 5
    ],
)
def test_a_warm_up_is_a_number_of_steps_or_a_share(
    tmp_path: Path, given: dict[str, Any], steps: int, share: float | None
) -> None:
    train = parsed(tmp_path, given).train
    assert (train.warmup_steps, train.warmup_ratio) == (steps, share)


@pytest.mark.parametrize(("more", "least"), [({"min_lr_rate": 0.1}, 5e-8), ({"min_lr": 2e-8}, 2e-8)])
def test_a_decay_that_ends_above_0(tmp_path: Path, more: dict[str, float], least: float) -> None:
    given = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": more, "learning_rate": 5e-7}
    train = parsed(tmp_path, given).train
    assert (train.schedule, train.min_learning_rate) == ("cosine", pytest.approx(least))


@pytest.mark.parametrize(
    ("given", "dtype"),
    [
        ({}, "bfloat16"),
        ({"bf16": True, "torch_dtype": "float16"}, "bfloat16"),
        ({"bf16": False}, "float32"),
        ({"bf16": False, "dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_the_compute_type(tmp_path: Path, given: dict[str, Any], dtype: str) -> None:
    assert parsed(tmp_path, given).model.dtype == dtype


def test_a_mixed_loss_keeps_its_weights_and_what_is_unknown_of_it_is_named(tmp_path: Path) -> None:
    given = {"loss_type": ["dpo", "no_such", "ipo", "sft"], "loss_weights": [0.8, 0.2, 0.5, 2.0]}
    loss = parsed(tmp_path, given).loss
    assert (loss.type, loss.weights, loss.sft_weight) == (["sigmoid", "ipo_norm"], [0.8, 0.5], 2.0)
    (lost,) = [line for line in convert(given, 1) if line.became is Became.NOT_MAPPED]
    assert lost.theirs == "loss_type: no_such"


@pytest.mark.parametrize(
    ("given", "key", "value"),
    [
        ({"rpo_alpha": 1.0}, "sft_weight", 1.0),
        ({"loss_type": "aot_pair"}, "type", "aot_unpaired"),
        ({"loss_type": "exo_pair"}, "label_smoothing", 0.001),
        ({"loss_type": "robust", "label_smoothing": 0.2}, "label_smoothing", 0.2),
        ({"beta": 0.01}, "beta", 0.01),
        ({"loss_type": "ipo"}, "type", "ipo_norm"),  # TRL's divides by the length
        ({"loss_type": "sft"}, "type", "sft"),
        ({"loss_type": "apo_zero_unpaired"}, "type", "apo_zero"),
        ({"loss_type": "kto", "desirable_weight": 1.5}, "desirable_weight", 1.5),
        ({"f_divergence_type": "js_divergence"}, "f_divergence", "js"),
        ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.25}, "f_alpha", 0.75),
        ({"f_divergence_type": "reverse_kl"}, "f_divergence", "reverse_kl"),
        ({"use_weighting": True}, "pair_weights", "wpo"),
    ],
)
def test_options_of_the_loss(tmp_path: Path, given: dict[str, Any], key: str, value: Any) -> None:
    assert getattr(parsed(tmp_path, given).loss, key) == value


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("adamw_torch_fused", "adamw"), ("adamw_bnb_8bit", "adamw_8bit"), ("paged_adamw_32bit", "paged_adamw")],
)
def test_optimizers(tmp_path: Path, theirs: str, ours: str) -> None:
    assert parsed(tmp_path, {"optim": theirs, "adam_epsilon": 1e-6}).train.optimizer == ours


def test_token_weights_need_token_log_probs(tmp_path: Path) -> None:
    config = parsed(tmp_path, {"ld_alpha": 0.5})
    assert (config.loss.ld_alpha, config.reference.store_token_logps) == (0.5, True)


def test_an_adapter_and_what_it_has_not_here(tmp_path: Path) -> None:
    given = {"use_peft": True, "lora_r": 8, "lora_target_modules": ["q_proj"], "lora_dropout": 0.05}
    lora = parsed(tmp_path, given).model.lora
    assert lora is not None
    assert (lora.rank, lora.alpha, lora.target_modules) == (8, 32.0, ["q_proj"])
    assert line_of("lora_dropout", given).became is Became.NOT_MAPPED
    assert parsed(tmp_path, given | {"use_peft": False}).model.lora is None
    kinds = {"use_dora": True, "use_rslora": True, "lora_modules_to_save": ["norm"], "load_in_4bit": True}
    model = parsed(tmp_path, given | kinds).model
    assert model.lora is not None
    assert (model.lora.dora, model.lora.rank_stabilized, model.lora.modules_to_save) == (True, True, ["norm"])
    assert model.quantization == "nf4"
    fp4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    assert line_of("bnb_4bit_quant_type", fp4).became is Became.NOT_MAPPED
    off = {"load_in_4bit": False}
    assert line_of("load_in_4bit", off).became is Became.NOT_NEEDED


def test_evaluations_checkpoints_and_trackers(tmp_path: Path) -> None:
    given = {"eval_strategy": "steps", "eval_steps": 50, "save_steps": 20, "save_total_limit": 3}
    train = parsed(tmp_path, given | {"report_to": ["tensorboard", "wandb"]}).train
    assert (train.evaluate_every, train.checkpoint_every, train.keep_last) == (50, 20, 3)
    assert train.trackers == ["wandb"]
    assert line_of("save_strategy", {"save_strategy": "epoch"}).became is Became.NOT_MAPPED


def test_a_schedule_that_does_not_exist_is_not_guessed() -> None:
    assert line_of("lr_scheduler_type", {"lr_scheduler_type": "polynomial"}).became is Became.NOT_MAPPED


@pytest.mark.parametrize("value", [None, False, 1, 2.5, "steps", ["a"], {"a": 1}])
def test_no_key_is_lost(value: Any) -> None:
    """Of transformers, of the table, and one that nobody knows, whatever they hold."""
    names = {option.name for option in fields(TrainingArguments)} | {*KEYS, "typo"}
    shown = " ".join(str(line) for line in convert(dict.fromkeys(names, value), 1))
    assert [name for name in names if name not in shown] == []
