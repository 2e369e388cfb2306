"""`dpo plan`: what a run will need, before a weight is loaded or a machine is rented."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from dpo.config import Config, ModelConfig
from dpo.data.plan import BatchPlan, share
from dpo.errors import UserError
from dpo.model.files import base_of, check_model_path, max_positions, num_parameters, weights_at_hand
from dpo.model.flops import Work, forward_flops, work_of
from dpo.model.load import DTYPES, load_config, load_tokenizer
from dpo.model.lora import check_policy, empty_policy
from dpo.planning.data_sample import SampledData, sample_data
from dpo.planning.fit import Advice, Fit, Machine, Way
from dpo.planning.memory import Shape, shape_of
from dpo.planning.traffic import sent, traffic
from dpo.reference.identity import is_remembered, reference_identity, reference_model
from dpo.reference.store import ReferenceStore
from dpo.train.disk_space import checkpoint_bytes, exported_bytes

CACHE_ROW_BYTES, CACHE_TOKEN_BYTES = 23, 4
"""A sequence in the reference cache, measured (docs/reference-cache.md), and a completion token where
reference.store_token_logps asks for it."""
STEPS_LOOKED_AT = 64


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that `dpo plan` says."""

    config: Config
    machine: Machine
    shape: Shape
    notes: list[str]
    data: dict[str, SampledData]
    steps: int
    rank_excess: float
    """Work of the steps' slowest ranks over the mean: time that the others wait."""
    micro_batches: float
    """Of a rank in a step, on average."""
    budget: int
    """Tokens of a micro-batch."""
    ways: list[Way]
    """With activations recomputed where the advice says so."""
    advice: Advice
    step_flops: float
    """Of one step over all ranks, recomputation included."""
    hours: float
    sent_bytes: float
    """By a rank in a step."""
    reference_hits: int
    reference_misses: int
    reference_hours: float
    reference_bytes: int
    """Of the rows that the cache lacks."""
    checkpoint_bytes: int
    model_bytes: int


def make_plan(config: Config, machine: Machine, *, exact: bool) -> Plan:
    """Plans a training run; reads configurations, headers and data, and loads no weight.

    Args:
        config: The experiment.
        machine: What it is to run on.
        exact: Tokenize all data instead of a sample.

    Raises:
        UserError: No such model or data, or a machine that nobody can have.
    """
    model = config.model
    check_model_path(model.name_or_path, "model.name_or_path")
    check_policy(model)
    described = _described(model)
    with torch.device("meta"):
        bare = empty_policy(described, model, dtype=DTYPES[model.dtype])
    shape, work = shape_of(bare), work_of(bare)
    data = sample_data(config.data, load_tokenizer(model), max_positions(model), exact=exact)
    train = data["train"]
    plan = BatchPlan(
        train.pairs_per_group,
        seed=config.train.seed,
        num_epochs=config.train.num_epochs,
        pairs_per_step=config.train.pairs_per_step,
        max_steps=config.train.max_steps,
    )
    fit = Fit(config, described, shape, train, machine)
    advice = fit.advice()
    ways = fit.ways(checkpointing=advice.gradient_checkpointing)
    budget = advice.max_tokens_per_micro_batch
    excess, micro_batches = _balance(plan, train, machine.num_gpus, budget)
    hits, misses, reference_flops = _reference(config, data, work)
    # Forward, gradients of the inputs and of the weights that are trained, and the forward pass once more.
    passes = 2 + shape.trainable / shape.parameters + advice.gradient_checkpointing
    epoch = float(forward_flops(train.sample, work)[train.stand_in].sum())
    flops = passes * epoch * plan.num_steps / max(1, _steps_of_an_epoch(plan, config))
    completions = float(train.sample.completion_tokens.sum()) * train.scale
    row = CACHE_ROW_BYTES + (
        CACHE_TOKEN_BYTES * completions / train.sequences if config.reference.store_token_logps else 0
    )
    messages = traffic(
        advice.sharding or "ZeRO-3",
        shape,
        world_size=machine.num_gpus,
        dtype=DTYPES[model.dtype],
        micro_batches=micro_batches,
    )
    speed = machine.num_gpus * machine.gpu_flops * machine.mfu * 3600
    return Plan(
        config=config,
        machine=machine,
        shape=shape,
        notes=_notes(config, shape, machine),
        data=data,
        steps=plan.num_steps,
        rank_excess=excess,
        micro_batches=micro_batches,
        budget=budget,
        ways=ways,
        advice=advice,
        step_flops=flops / plan.num_steps,
        hours=flops * (1 + excess) / speed,
        sent_bytes=sent(messages, machine.num_gpus),
        reference_hits=hits,
        reference_misses=misses,
        reference_hours=reference_flops / speed,
        reference_bytes=round(misses * row),
        checkpoint_bytes=checkpoint_bytes(
            shape.trainable, DTYPES[model.dtype], config.train, sharded=advice.sharding != "no DeepSpeed"
        ),
        model_bytes=exported_bytes(model, _of_the_base(model, shape), shape.trainable),
    )


def _described(model: ModelConfig) -> PreTrainedConfig:
    try:
        return load_config(model)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model.name_or_path: no configuration of {model.name_or_path}: {first}") from error


def _notes(config: Config, shape: Shape, machine: Machine) -> list[str]:
    notes, base = [], base_of(config.model)
    if not weights_at_hand(base):
        notes.append("the weights are not on this machine: counted from the model's configuration")
    elif (held := num_parameters(base)) < (expected := _of_the_base(config.model, shape)):
        notes.append(
            f"the weight files hold {held:,} parameters and the configuration describes "
            f"{expected:,}: an incomplete download?"
        )
    if config.train.pairs_per_step < machine.num_gpus:
        notes.append(
            f"train.pairs_per_step is {config.train.pairs_per_step}: at most so many of "
            f"{machine.num_gpus} GPUs have work in a step"
        )
    return notes


def _of_the_base(model: ModelConfig, shape: Shape) -> int:
    """Parameters without those of an adapter."""
    return shape.parameters - (shape.trainable if model.lora is not None else 0)


def _balance(plan: BatchPlan, train: SampledData, ranks: int, budget: int) -> tuple[float, float]:
    """Work of the slowest ranks over the mean, and micro-batches of a rank, over some of the run's steps."""
    numbers = np.unique(np.linspace(1, plan.num_steps, STEPS_LOOKED_AT).astype(int))
    slowest, mean, batches = 0.0, 0.0, []
    for number in numbers:
        groups = train.stand_in[plan.step(int(number)).groups]
        sizes = train.sample.sizes(groups, "packed")
        shares = share(sizes, world_size=ranks, budget=budget)
        loads = [sizes.work[np.concatenate(own).astype(int)].sum() for own in shares]
        slowest, mean = slowest + float(np.max(loads)), mean + float(np.mean(loads))
        batches.append(len(shares[0]))
    return slowest / mean - 1, float(np.mean(batches))


def _steps_of_an_epoch(plan: BatchPlan, config: Config) -> float:
    """Steps that one pass over the data takes."""
    return plan.num_steps / plan.step(plan.num_steps).epoch


def _reference(config: Config, data: dict[str, SampledData], work: Work) -> tuple[int, int, float]:
    """Sequences that the cache has and lacks, and the operations that the missing ones take."""
    model, cache_dir = reference_model(config.model, config.reference), Path(config.reference.cache_dir)
    store = None
    if weights_at_hand(base_of(model)) and is_remembered(model, cache_dir):
        store = ReferenceStore(cache_dir, reference_identity(model, cache_dir))
    hits, sequences, flops = 0.0, 0, 0.0
    for split in data.values():
        found = 0.0
        if store is not None and store.path.is_dir():
            found = float(np.mean(store.load().index.find(split.sample.keys) >= 0))
        hits += found * split.sequences
        sequences += split.sequences
        flops += (1 - found) * float(forward_flops(split.sample, work)[split.stand_in].sum())
    return round(hits), sequences - round(hits), flops


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan in plain types: bytes, seconds' hours and tokens as numbers."""
    return {
        "model": {"name_or_path": plan.config.model.name_or_path, **asdict(plan.shape)},
        "machine": asdict(plan.machine),
        "notes": plan.notes,
        "data": {
            name: {
                "groups": split.groups,
                "pairs": split.pairs,
                "sequences": split.sequences,
                "longest": split.longest,
                "exact": split.exact,
                **split.tokens.under("tokens"),
                **split.changed,
            }
            for name, split in plan.data.items()
        },
        "steps": plan.steps,
        "rank_excess": plan.rank_excess,
        "micro_batches": plan.micro_batches,
        "max_tokens_per_micro_batch": plan.budget,
        "memory": {
            way.sharding: {
                **asdict(way.memory),
                "total": way.memory.total,
                "fits": way.fits,
                "largest_micro_batch": way.largest_micro_batch,
            }
            for way in plan.ways
        },
        "advice": asdict(plan.advice),
        "step_flops": plan.step_flops,
        "hours": plan.hours,
        "sent_bytes": plan.sent_bytes,
        "reference": {
            "hits": plan.reference_hits,
            "misses": plan.reference_misses,
            "hours": plan.reference_hours,
            "bytes": plan.reference_bytes,
        },
        "checkpoint_bytes": plan.checkpoint_bytes,
        "model_bytes": plan.model_bytes,
    }
