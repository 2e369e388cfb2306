"""From TRL's options to ours: pure rules, which account for every key that they are given.

A key of theirs is mapped, needs no option here, or is not mapped, each with the reason. What their file
leaves out takes their default where ours differs.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, get_args, get_type_hints

from dpo.config import ModelConfig, OptimizationConfig
from dpo.config.foreign import BUILT_IN, KEYS, MISSING, VALUES
from dpo.convert import data
from dpo.convert.lines import Given, Line, Lines, mapped, not_mapped, not_needed
from dpo.loss.catalog import LOSSES

BATCH, EPOCHS, SCHEDULE, RATE, SEED, RANK = 8, 3, "linear", 1e-6, 42, 16
"""TRL's defaults, where ours differ or its file may leave them out."""
OTHERWISE = {"ipo": "ipo_norm"}
"""Losses of TRL that have another name here, because theirs stands for another definition."""
BY_STEPS = "ours counts optimizer steps: dpo plan shows how many there are"


def convert(given: Given, num_gpus: int) -> list[Line]:
    """What becomes of every key of their configuration.

    Args:
        given: Theirs, as read from YAML.
        num_gpus: On how many GPUs the run was.
    """
    lines: list[Line] = []
    used: set[str] = set()
    for keys, rule in _RULES.items():
        present = {key: given[key] for key in keys if key in given}
        lines += _readable(present, partial(rule, present, given))
        used |= present.keys()
    batch = {
        key: given[key]
        for key in ("per_device_train_batch_size", "gradient_accumulation_steps")
        if key in given
    }
    lines += _readable(batch, partial(_batch, given, num_gpus))
    used |= {"per_device_train_batch_size", "gradient_accumulation_steps"}
    return [*lines, *(_plain(key, value) for key, value in given.items() if key not in used)]


def _readable(theirs: Given, rule: Callable[[], Lines]) -> list[Line]:
    """A rule's lines; where a value is not of the kind that TRL takes, that is said instead."""
    try:
        return list(rule())
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        return [not_mapped(theirs, f"cannot be read: {type(error).__name__}: {error}")]


def _plain(key: str, value: Any) -> Line:
    """A key that stands for itself."""
    one = {key: value}
    if key == "max_length" and value is None:
        return not_mapped(one, "without data.max_length ours is 1024 tokens: set it")
    if key in KEYS and value is not None and isinstance(value, str | int | float):
        return mapped(one, {KEYS[key][0]: value})
    if key in BUILT_IN:
        return not_needed(one, BUILT_IN[key])
    if value in (None, False):
        return not_needed(one, "off")
    return not_mapped(one, MISSING.get(key, "there is no such option"))


def _choice(kind: type, theirs: Given, key: str, value: Any) -> Line:
    """A key whose values have names, by the table of names."""
    legal = get_args(get_type_hints(kind)[key.rpartition(".")[2]])
    ours = VALUES.get(key, {}).get(str(value).lower(), value)
    if ours in legal:
        return mapped(theirs, {key: ours})
    return not_mapped(theirs, f"expected one of {', '.join(legal)}")


def _batch(given: Given, num_gpus: int) -> Lines:
    per_gpu, passes = (
        int(given.get("per_device_train_batch_size", BATCH)),
        int(given.get("gradient_accumulation_steps", 1)),
    )
    theirs = (
        f"per_device_train_batch_size {per_gpu} x gradient_accumulation_steps {passes} x {num_gpus} GPU(s)"
    )
    yield mapped(
        theirs, {"train.pairs_per_step": per_gpu * passes * num_gpus}, "say --num_gpus if it had others"
    )


def _schedule(theirs: Given, given: Given) -> Lines:
    name, more = given.get("lr_scheduler_type", SCHEDULE), given.get("lr_scheduler_kwargs") or {}
    if str(name).startswith("cosine_with_min_lr") and more.keys() <= {"min_lr", "min_lr_rate"}:
        least = more.get("min_lr") or more.get("min_lr_rate", 0.0) * float(given.get("learning_rate", RATE))
        yield mapped(theirs, {"train.schedule": "cosine", "train.min_learning_rate": float(least)})
        return
    if "lr_scheduler_kwargs" in theirs:
        yield _plain("lr_scheduler_kwargs", more or None)
    shown = {key: value for key, value in theirs.items() if key == "lr_scheduler_type"}
    yield _choice(OptimizationConfig, shown, "train.schedule", name)


def _warmup(theirs: Given, given: Given) -> Lines:
    steps = float(given.get("warmup_steps") or 0)
    share = steps if steps < 1 else 0.0  # as transformers 5 reads it
    if share := share or (float(given.get("warmup_ratio") or 0) if steps == 0 else 0.0):
        yield mapped(theirs, {"train.warmup_ratio": share})
    else:
        yield mapped(theirs, {"train.warmup_steps": int(steps)})


def _epochs(theirs: Given, given: Given) -> Lines:
    epochs = float(given.get("num_train_epochs", EPOCHS))
    if epochs == int(epochs):
        yield mapped(theirs, {"train.num_epochs": int(epochs)})
    else:
        yield not_mapped(theirs, "expected whole epochs: set train.num_epochs and train.max_steps")


def _max_steps(theirs: Given, given: Given) -> Lines:
    if theirs:
        steps = int(given["max_steps"])
        yield mapped(theirs, {"train.max_steps": steps}) if steps > 0 else not_needed(theirs, "all epochs")


def _adam(theirs: Given, given: Given) -> Lines:
    if theirs:
        betas = [float(given.get("adam_beta1", 0.9)), float(given.get("adam_beta2", 0.999))]
        yield mapped(theirs, {"train.adam_betas": betas})


def _optimizer(theirs: Given, given: Given) -> Lines:
    if theirs:
        yield _choice(OptimizationConfig, theirs, "train.optimizer", given["optim"])


def _seed(theirs: Given, given: Given) -> Lines:
    yield mapped(theirs, {"train.seed": int(given.get("seed", SEED))})


def _dtype(theirs: Given, given: Given) -> Lines:
    named = str(given.get("torch_dtype") or given.get("dtype")).removeprefix("torch.")
    if given.get("fp16"):
        yield not_mapped(theirs, MISSING["fp16"])
    elif given.get("bf16") is False and named != "bfloat16":
        yield mapped(theirs, {"model.dtype": "float32"})
    elif theirs:
        yield mapped(theirs, {"model.dtype": "bfloat16"}, "computes in it; master weights are float32")


def _attention(theirs: Given, given: Given) -> Lines:
    if given.get("use_flash_attention_2"):
        yield mapped(theirs, {"model.attention": "auto"})
    elif given.get("attn_implementation"):
        yield _choice(ModelConfig, theirs, "model.attention", given["attn_implementation"])
    elif theirs:
        yield not_needed(theirs, "the default")


def _lora(theirs: Given, given: Given) -> Lines:
    if theirs and not given.get("use_peft"):
        yield not_needed(theirs, "use_peft is off")
        return
    if theirs:
        ours = {"rank": given.get("lora_r", RANK), "alpha": float(given.get("lora_alpha", 2 * RANK))}
        targets, said = given.get("lora_target_modules"), "peft chooses by architecture: here all-linear"
        ours |= {"target_modules": targets} if targets else {}
        ours |= {option: given[key] for key, option in _LORA_KINDS.items() if given.get(key)}
        shown = {key: given[key] for key in (*_LORA, *_LORA_KINDS) if key in given}
        yield mapped(
            shown, {f"model.lora.{key}": value for key, value in ours.items()}, "" if targets else said
        )
        for key in theirs.keys() - shown.keys():
            yield _plain(key, given[key])


def _in_few_bits(theirs: Given, given: Given) -> Lines:
    if given.get("load_in_8bit"):
        yield mapped(theirs, {"model.quantization": "int8"}, "activations are not rounded")
    elif theirs and not given.get("load_in_4bit"):
        yield not_needed(theirs, "off")
    elif theirs and given.get("bnb_4bit_quant_type", "nf4") == "nf4":
        yield mapped(theirs, {"model.quantization": "nf4"}, "the scales are quantized too")
    elif theirs:
        yield not_mapped(theirs, "expected nf4")


def _evaluation(theirs: Given, given: Given) -> Lines:
    if not theirs:
        return
    how = given.get("eval_strategy", given.get("evaluation_strategy", "no"))
    every = given.get("eval_steps") or given.get("logging_steps") or 10
    if how == "steps" and every >= 1:
        yield mapped(theirs, {"train.evaluate_every": int(every)})
    elif how in ("no", False):
        yield not_needed(theirs, "held-out data is evaluated at both ends")
    else:
        yield not_mapped(theirs, f"set train.evaluate_every; {BY_STEPS}")


def _saving(theirs: Given, given: Given) -> Lines:
    if not theirs:
        return
    how, every, kept = (
        given.get("save_strategy", "steps"),
        given.get("save_steps", 500),
        given.get("save_total_limit"),
    )
    ours = {"train.keep_last": int(kept)} if kept else {}
    if how in ("no", False):
        yield not_needed(theirs, "no checkpoints is the default")
    elif how == "steps" and every >= 1:
        yield mapped(theirs, {"train.checkpoint_every": int(every)} | ours)
    else:
        yield not_mapped(theirs, f"set train.checkpoint_every and train.keep_last; {BY_STEPS}")


def _trackers(theirs: Given, given: Given) -> Lines:
    if theirs:
        named = given["report_to"] if isinstance(given["report_to"], list) else [given["report_to"]]
        others = [name for name in named if name not in (None, "none", "all", "tensorboard")]
        said = "TensorBoard is always written"
        yield mapped(theirs, {"train.trackers": others}, said) if others else not_needed(theirs, said)


def _resuming(theirs: Given, given: Given) -> Lines:
    if theirs:
        where = given["resume_from_checkpoint"]
        said = "a run resumes by itself, from its newest valid checkpoint"
        checkpoint = isinstance(where, str) and where.lower() not in ("true", "false")
        yield mapped(theirs, {"train.resume": where}) if checkpoint else not_needed(theirs, said)


def _loss(theirs: Given, given: Given) -> Lines:
    named = given.get("loss_type") or "sigmoid"
    ours_of = VALUES["loss.type"] | OTHERWISE
    names = [ours_of.get(name, name) for name in (named if isinstance(named, list) else [named])]
    weights = dict(zip(names, given.get("loss_weights") or [1.0] * len(names), strict=False))
    sft = (weights.pop("sft", 0) if len(weights) > 1 else 0) + (given.get("rpo_alpha") or 0)
    smoothing = given.get("label_smoothing") or 0.0
    kept = {name: weight for name, weight in weights.items() if name in LOSSES}
    ours: dict[str, Any] = {}
    if "loss_type" in theirs and kept:
        ours["loss.type"] = next(iter(kept)) if len(kept) == 1 else [*kept]
    if {*kept.values()} - {1}:
        ours["loss.weights"] = [*kept.values()]
    if sft:
        ours["loss.sft_weight"] = sft
    if smoothing or "exo_pair" in kept:
        ours["loss.label_smoothing"] = smoothing or 0.001  # TRL's own for exo_pair
    if ours:
        yield mapped(theirs, ours)
    elif theirs and kept:
        yield not_needed(theirs, "the default")
    for name in weights.keys() - kept.keys():
        yield not_mapped({"loss_type": name}, f"expected one of {', '.join(LOSSES)}")


def _ld_alpha(theirs: Given, given: Given) -> Lines:
    if given.get("ld_alpha") is not None:
        yield mapped(theirs, {"loss.ld_alpha": given["ld_alpha"], "reference.store_token_logps": True})
    elif theirs:
        yield not_needed(theirs, "off")


def _divergence(theirs: Given, given: Given) -> Lines:
    if not theirs:
        return
    named = str(given.get("f_divergence_type", "reverse_kl")).lower().rpartition(".")[2]
    alpha = 1 - float(given.get("f_alpha_divergence_coef", 0.5))
    name = named.removesuffix("_divergence")
    if name == "reverse_kl":
        yield not_needed(theirs, "the default")
    elif name == "alpha" and 0 < alpha < 1:
        yield mapped(theirs, {"loss.f_divergence": name, "loss.f_alpha": alpha}, "ours is 1 minus theirs")
    elif name in ("forward_kl", "js"):
        yield mapped(theirs, {"loss.f_divergence": name})
    else:
        yield not_mapped(theirs, "expected reverse_kl, forward_kl, js, or alpha with a number in (0, 1)")


def _weighting(theirs: Given, given: Given) -> Lines:
    if given.get("use_weighting"):
        yield mapped(theirs, {"loss.pair_weights": "wpo"})
    elif theirs:
        yield not_needed(theirs, "off")


_LORA = ("use_peft", "lora_r", "lora_alpha", "lora_target_modules")
_LORA_KINDS = {
    "use_rslora": "rank_stabilized",
    "use_dora": "dora",
    "lora_target_parameters": "target_parameters",
    "lora_modules_to_save": "modules_to_save",
}
_RULES: dict[tuple[str, ...], Callable[[Given, Given], Lines]] = {
    ("torch_dtype", "dtype", "bf16", "fp16"): _dtype,
    ("attn_implementation", "use_flash_attention_2"): _attention,
    (*_LORA, *_LORA_KINDS, "lora_dropout", "lora_task_type"): _lora,
    ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant"): _in_few_bits,
    data.KEYS: data.data_lines,
    ("loss_type", "loss_weights", "rpo_alpha", "label_smoothing"): _loss,
    ("ld_alpha",): _ld_alpha,
    ("f_divergence_type", "f_alpha_divergence_coef"): _divergence,
    ("use_weighting",): _weighting,
    ("lr_scheduler_type", "lr_scheduler_kwargs"): _schedule,
    ("warmup_ratio", "warmup_steps"): _warmup,
    ("optim",): _optimizer,
    ("adam_beta1", "adam_beta2"): _adam,
    ("num_train_epochs",): _epochs,
    ("max_steps",): _max_steps,
    ("seed",): _seed,
    ("eval_strategy", "evaluation_strategy", "eval_steps"): _evaluation,
    ("save_strategy", "save_steps", "save_total_limit"): _saving,
    ("report_to",): _trackers,
    ("resume_from_checkpoint",): _resuming,
}
"""Keys that mean something together -> what they become, from those that are there and the whole file."""
