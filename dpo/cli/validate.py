"""Everything wrong with a configuration at once, without loading a model or opening the data.

Ranges stand beside the options in `dpo.config` and are checked by one function; the others relate options to
each other or to files.
"""

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from dpo.config import (
    FIELDS,
    SCORER_KINDS,
    SCORER_NAMES,
    Config,
    DataConfig,
    DataSource,
    ModelConfig,
    OptimizationConfig,
    SftConfig,
    SftModelConfig,
    Within,
    sources_of,
)
from dpo.config.foreign import meant
from dpo.loss.catalog import (
    has_running_sums,
    is_known,
    loss_problems,
    names_of,
    needs_reference,
    needs_whole_step,
)


def problems(config: Config | SftConfig) -> list[str]:
    """Everything wrong with the values, each as `key: value; expected what`. Empty if nothing is."""
    found = [*range_problems(config)]
    found += _lora_problems(config.model)
    found += _data_problems(config.data)
    found += _train_problems(config.train, config.data)
    found += _resume_allow_problems(config)
    if config.model.router_aux_loss_weight and config.train.backward == "direct":
        found.append(
            "train.backward: direct; model.router_aux_loss_weight balances the whole step: set auto or cached"
        )
    found += _sft_problems(config) if isinstance(config, SftConfig) else _preference_problems(config)
    return found


def range_problems(section: Any, place: str = "") -> Iterator[str]:
    """Numbers outside the range that their option's type names, in nested sections and lists too.

    Args:
        section: A configuration, or a part of one.
        place: Its dotted key, with a dot at the end; empty for a whole configuration.
    """
    hints = get_type_hints(type(section), include_extras=True)
    for field in fields(section):
        value, key = getattr(section, field.name), f"{place}{field.name}"
        for index, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if is_dataclass(item):
                yield from range_problems(item, f"{key}." if index is None else f"{key}[{index}].")
        legal = _range_of(hints[field.name])
        numbers = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if legal is not None and not all(number in legal for number in numbers):
            noun = "numbers" if numbers is value else "a number"
            yield f"{key}: {value}; expected {noun} {legal!r}".replace(" at least", " of at least")


def _range_of(hint: Any) -> Within | None:
    """The range in a type such as `Annotated[float, Within(...)] | None` or a tuple of them."""
    if get_origin(hint) is Annotated:
        return next((extra for extra in hint.__metadata__ if isinstance(extra, Within)), None)
    return next((legal for part in get_args(hint) if (legal := _range_of(part)) is not None), None)


def _lora_problems(model: ModelConfig) -> Iterator[str]:
    if model.compile and model.gradient_checkpointing == "selective":
        yield "model.compile: true; selective recomputation sees no single operations in it: set full"
    if model.compile and model.offload_activations:
        yield "model.compile: true; it has not been tried with model.offload_activations: leave one out"
    if model.compile and model.quantization == "int8":
        yield "model.compile: true; it has not been tried with model.quantization: int8: leave one out"
    if model.quantization is not None and model.lora is None:
        yield f"model.quantization: {model.quantization}; such weights are not trained: set model.lora.rank"
    if (lora := model.lora) is None:
        return
    if not lora.target_modules or not all(lora.target_modules):
        yield f"model.lora.target_modules: {lora.target_modules}; expected all-linear, or names of layers"
    if lora.start == "merge" and model.quantization is not None:
        yield "model.lora.start: merge; quantized weights cannot hold the sum: continue, or merge it before"
    if lora.start == "merge" and lora.export == "adapter":
        yield "model.lora.export: adapter; a merged start is in no folder that it could name: set merged"
    elif (
        model.revision is not None and lora.export == "adapter" and lora.start == "new"
    ):  # peft loads a base's main branch
        yield f"model.lora.export: adapter; it cannot name revision {model.revision} of its base: set merged"
    if isinstance(model, SftModelConfig) and model.scratch is not None:
        yield "model.lora: an adapter needs a base, and model.scratch has random weights: leave one out"


def _data_problems(data: DataConfig) -> Iterator[str]:
    for key, sources in (("data.train", data.train), ("data.test", data.test)):
        if sources == []:
            yield f"{key}: an empty list; expected at least one path, or {{path, weight}}"
        for source in sources_of(sources) if sources is not None else []:
            if source.path == "":
                yield f"{key}: empty; expected a path or a hub name"
            if source.path.startswith("{"):  # a mapping that could not be read as a source
                options = ", ".join(field.name for field in fields(DataSource))
                yield f"{key}: {source.path}; expected {{path: ...}}, with any of {options}"
            for name in source.columns or {}:
                if name not in FIELDS:
                    yield f"{key}: {source.path}: columns: {name}; expected a field of {', '.join(FIELDS)}"
    longest_prompt, longest = data.max_prompt_length, data.max_length
    if longest_prompt is not None and longest is not None and longest_prompt >= longest:
        yield f"data.max_prompt_length: {longest_prompt}; expected less than data.max_length, {longest}"


def _train_problems(train: OptimizationConfig, data: DataConfig) -> Iterator[str]:
    yield from _budget_problems(
        "train.max_tokens_per_micro_batch", train.max_tokens_per_micro_batch, data.max_length
    )
    yield from _schedule_problems(train)
    if train.resume not in ("auto", "never") and not Path(train.resume).is_dir():
        hint = meant("train.resume", train.resume, ("auto", "never"))
        yield f"train.resume: {train.resume}; expected auto, never, or the folder of a checkpoint{hint}"
    if train.mirror is not None and not train.checkpoint_every:
        yield f"train.mirror: {train.mirror}; checkpoints are copied there: set train.checkpoint_every"
    if train.mirror is not None and train.resume == "never":
        yield f"train.mirror: {train.mirror}; a run is resumed from there, and train.resume is never"


def _schedule_problems(train: OptimizationConfig) -> Iterator[str]:
    least, peak = train.min_learning_rate, train.learning_rate
    if least > 0 and train.schedule == "constant":
        yield f"train.min_learning_rate: {least}; expected 0: the schedule is constant, without a decay"
    if least > peak > 0:
        yield f"train.min_learning_rate: {least}; expected at most train.learning_rate, {peak}"
    if train.warmup_ratio is not None and train.warmup_steps != type(train)().warmup_steps:
        yield f"train.warmup_ratio: {train.warmup_ratio}; train.warmup_steps is given too: leave one out"


def _budget_problems(key: str, budget: int | None, max_length: int | None) -> Iterator[str]:
    if budget is not None and max_length is not None and 2 <= budget < max_length:
        yield f"{key}: {budget}; expected at least data.max_length, {max_length}: the longest row must fit"


def _resume_allow_problems(config: Config | SftConfig) -> Iterator[str]:
    for name in filter(None, config.train.resume_allow.split(",")):
        place: object = config
        for part in name.split("."):
            place = getattr(place, part, _NO_SUCH_KEY)
        if place is _NO_SUCH_KEY:
            yield f"train.resume_allow: {name}; expected names of keys such as loss.beta,train.seed"


_NO_SUCH_KEY = object()


def _sft_problems(config: SftConfig) -> Iterator[str]:
    scratch = config.model.scratch
    if bool(config.model.name_or_path) == (scratch is not None):
        yield "model: expected exactly one of model.name_or_path and model.scratch"
    if scratch and not Path(scratch.config).is_file():
        yield f"model.scratch.config: {scratch.config}; no such file"


def _moving_problems(config: Config) -> Iterator[str]:
    key, losses = f"reference.update_every: {config.reference.update_every}", names_of(config.loss)
    if all(map(is_known, losses)) and not needs_reference(config.loss):
        yield f"{key}; {', '.join(losses)} compares with no reference: leave it out"
    if has_running_sums(config.loss):
        yield f"{key}; {', '.join(losses)} averages rewards over all steps, against one reference: set 0"
    if (lora := config.model.lora) is None:
        return
    if lora.start == "merge":
        yield f"{key}; an adapter cannot name its base, a merged start: merge it before"
    if config.model.revision is not None and lora.start == "new":
        yield f"{key}; an adapter cannot name revision {config.model.revision} of its base: set 0"


def _preference_problems(config: Config) -> Iterator[str]:
    if not config.model.name_or_path:
        yield "model.name_or_path: empty; expected a folder or a hub name"
    yield from loss_problems(config.loss)
    if needs_whole_step(config.loss) and config.train.backward == "direct":
        yield f"train.backward: direct; {config.loss.type} needs the whole step: set auto or cached"
    if needs_whole_step(config.loss) and config.train.pairs_per_step < 2:
        losses = ", ".join(names_of(config.loss))
        yield (
            f"train.pairs_per_step: {config.train.pairs_per_step}; {losses} compares the pairs of a step: "
            "expected at least 2, and far more"
        )
    if "plackett_luce" in names_of(config.loss) and not config.data.group_pairs:
        yield "data.group_pairs: false; plackett_luce ranks the completions of a group: set true"
    if config.reference.update_every:
        yield from _moving_problems(config)
    yield from _budget_problems(
        "reference.max_tokens_per_batch", config.reference.max_tokens_per_batch, config.data.max_length
    )
    for key, sharding in (("reference", config.reference.sharding), ("evaluate", config.evaluate.sharding)):
        if sharding == "zero3" and config.model.quantization is not None:
            yield f"{key}.sharding: zero3; quantized weights cannot be sharded: set auto or replicas"
    scorer = config.evaluate.scorer
    if scorer not in (None, "vader") and not any(
        scorer.startswith(f"{kind}:") and scorer[len(kind) + 1 :] for kind in SCORER_KINDS
    ):
        other = ": a judge compares, set evaluate.judge" if scorer.startswith("judge:") else ""
        yield f"evaluate.scorer: {scorer}; expected {SCORER_NAMES}, or nothing{other}"
    judge, rubric = config.evaluate.judge, config.evaluate.judge_rubric
    if judge is not None and not all(judge.partition("@http")[::2]):
        yield f"evaluate.judge: {judge}; expected MODEL@URL, such as mine@http://127.0.0.1:8000"
    if rubric is not None and (judge is None or not Path(rubric).is_file()):
        expected = "a text file" if judge is not None else "evaluate.judge with it"
        yield f"evaluate.judge_rubric: {rubric}; expected {expected}"
