"""Everything wrong with a configuration at once, without loading a model or opening the data."""

import math
from collections.abc import Iterator
from pathlib import Path

from dpo.config import Config, DataConfig, ModelConfig, OptimizationConfig, SftConfig, SftModelConfig
from dpo.loss.catalog import loss_problems, names_of


def problems(config: Config | SftConfig) -> list[str]:
    """Everything wrong with the values, each as `key: value; expected what`. Empty when all is well."""
    found = [*_optimization_problems(config.train), *_allow_problems(config), *_lora_problems(config.model)]
    budget = config.train.max_tokens_per_micro_batch
    found.extend(_budget_problems("train.max_tokens_per_micro_batch", budget, config.data.max_length))
    found.extend(_data_problems(config.data))
    if isinstance(config, SftConfig):
        if bool(config.model.name_or_path) == (config.model.scratch is not None):
            found.append("model: expected exactly one of model.name_or_path and model.scratch")
        found.extend(_below(config.train, "train", 1, "sequences_per_step"))
        scratch = config.model.scratch
        if scratch and not Path(scratch.config).is_file():
            found.append(f"model.scratch.config: {scratch.config}; no such file")
        return found
    return [*found, *_preference_problems(config)]


def _below(section: object, place: str, minimum: int, *names: str) -> Iterator[str]:
    for name in names:
        if not getattr(section, name) >= minimum:
            yield f"{place}.{name}: {getattr(section, name)}; expected at least {minimum}"


def _lora_problems(model: ModelConfig) -> Iterator[str]:
    if (lora := model.lora) is None:
        return
    yield from _below(lora, "model.lora", 1, "rank")
    if not 0 < lora.alpha < math.inf:
        yield f"model.lora.alpha: {lora.alpha}; expected a number above 0"
    if not lora.target_modules or not all(lora.target_modules):
        yield f"model.lora.target_modules: {lora.target_modules}; expected all-linear, or names of layers"
    if (
        model.revision is not None and lora.export == "adapter"
    ):  # what loads adapters takes a base's main branch
        yield f"model.lora.export: adapter; it cannot name revision {model.revision} of its base: set merged"
    if isinstance(model, SftModelConfig) and model.scratch is not None:
        yield "model.lora: an adapter needs a base; model.scratch has random weights: leave one of them out"


def _budget_problems(key: str, budget: int | None, max_length: int | None) -> Iterator[str]:
    if budget is not None and budget < 2:
        yield f"{key}: {budget}; expected at least 2"
    elif budget is not None and max_length is not None and budget < max_length:
        yield f"{key}: {budget}; expected at least data.max_length, {max_length}: the longest row must fit"


def _data_problems(data: DataConfig) -> Iterator[str]:
    if data.max_length is not None and data.max_length < 2:
        yield f"data.max_length: {data.max_length}; expected at least 2: a prompt and a completion token"
    for key, sources in (("data.train", data.train), ("data.test", data.test)):
        if isinstance(sources, list):
            if not sources:
                yield f"{key}: an empty list; expected at least one {{path, weight}}"
            for index, source in enumerate(sources):
                if not source.weight > 0:
                    yield f"{key}[{index}].weight: {source.weight}; expected a number above 0"
        elif sources == "":
            yield f"{key}: empty; expected a path or a hub name"
    longest_prompt, longest = data.max_prompt_length, data.max_length
    if longest_prompt is not None and (
        longest_prompt < 1 or (longest is not None and longest_prompt >= longest)
    ):
        bound = "data.max_length" if longest is None else longest
        yield f"data.max_prompt_length: {longest_prompt}; expected at least 1 and less than {bound}"
    yield from _below(data, "data", 0, "min_margin")


def _allow_problems(config: Config | SftConfig) -> Iterator[str]:
    for name in filter(None, config.train.resume_allow.split(",")):
        place: object = config
        for part in name.split("."):
            place = getattr(place, part, None) if hasattr(place, part) else _NO_SUCH_KEY
        if place is _NO_SUCH_KEY:
            yield f"train.resume_allow: {name}; expected names of keys such as loss.beta,train.seed"


_NO_SUCH_KEY = object()


def _optimization_problems(train: OptimizationConfig) -> Iterator[str]:
    zero = "warmup_steps", "weight_decay", "max_grad_norm", "seed", "evaluate_every", "checkpoint_every"
    yield from _below(train, "train", 0, "snapshot_every")
    yield from _below(train, "train", 0, *zero, "max_skipped_steps")
    yield from _below(train, "train", 1, "num_epochs", "keep_last")
    if not train.learning_rate > 0:
        yield f"train.learning_rate: {train.learning_rate}; expected a number above 0"
    if train.max_steps is not None and train.max_steps < 1:
        yield f"train.max_steps: {train.max_steps}; expected at least 1, or nothing"
    if not all(0 <= beta < 1 for beta in train.adam_betas):
        yield f"train.adam_betas: {list(train.adam_betas)}; expected two numbers in [0, 1)"
    if not train.stuck_after_seconds > 0:
        yield f"train.stuck_after_seconds: {train.stuck_after_seconds}; expected a number of seconds above 0"
    if train.peak_tflops is not None and not train.peak_tflops > 0:
        yield f"train.peak_tflops: {train.peak_tflops}; expected a number above 0, or nothing"
    if train.resume not in ("auto", "never") and not Path(train.resume).is_dir():
        yield f"train.resume: {train.resume}; expected auto, never, or the folder of a checkpoint"


def _preference_problems(config: Config) -> Iterator[str]:
    if not config.model.name_or_path:
        yield "model.name_or_path: empty; expected a folder or a hub name"
    yield from loss_problems(config.loss)
    if "plackett_luce" in names_of(config.loss) and not config.data.group_pairs:
        yield "data.group_pairs: false; plackett_luce ranks the completions of a group: set true"
    yield from _below(config.train, "train", 1, "pairs_per_step")
    budget = config.reference.max_tokens_per_batch
    yield from _budget_problems("reference.max_tokens_per_batch", budget, config.data.max_length)
    yield from _below(config.reference, "reference", 0, "audit_rows", "flush_every_seconds")
    evaluate = config.evaluate
    yield from _below(evaluate, "evaluate", 0, "num_prompts", "temperature", "seed", "table_rows")
    yield from _below(evaluate, "evaluate", 0, "watched_prompts")
    yield from _below(evaluate, "evaluate", 1, "completion_tokens", "batch_size")
    yield from _below(evaluate, "evaluate", 8, "reference_samples")
    if evaluate.scorer is not None and evaluate.scorer != "vader" and not evaluate.scorer.startswith("hf:"):
        yield f"evaluate.scorer: {evaluate.scorer}; expected vader, hf:MODEL, or nothing"
