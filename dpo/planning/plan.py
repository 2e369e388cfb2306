"""`dpo plan`: what a training run will need, before weights are loaded or machines are rented.

Sizes of the data (`data_sample`), memory and the sharding to use (`fit`), work and time, traffic, disk. Reads
configurations, headers and data, and no weights.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedConfig

from dpo.config import DataConfig, ModelConfig, ReferenceConfig, TrainConfig
from dpo.data.plan import BatchPlan, Int64s, share
from dpo.engine.optimizer import OPTIMIZERS, state_bytes
from dpo.errors import UserError
from dpo.model.files import base_of, check_model_path, max_positions, num_parameters, weights_at_hand
from dpo.model.flops import Work, forward_flops, work_of
from dpo.model.load import DTYPES, load_config
from dpo.model.lora import check_policy, empty_policy
from dpo.model.recomputation import recomputed_share
from dpo.model.tokenizer import load_tokenizer
from dpo.planning.data_sample import SampledData, sample_data
from dpo.planning.fit import Advice, Fit, Machine, Way
from dpo.planning.memory import Shape, shape_of
from dpo.planning.speed import launch_note
from dpo.planning.traffic import sent, traffic
from dpo.reference.identity import is_remembered, reference_identity, reference_model
from dpo.reference.store import ReferenceStore
from dpo.train.disk_space import checkpoint_bytes, exported_bytes
from dpo.train.micro_batches import cut
from dpo.train.moving_reference import num_updates

CACHE_ROW_BYTES, CACHE_TOKEN_BYTES = 23, 4
"""Bytes per sequence in the reference cache, measured (docs/reference-cache.md), and per completion token
with reference.store_token_logps."""
SAMPLED_STEPS = 64
"""Steps over which the balance of the ranks is averaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """How evenly the ranks are loaded, on average over the steps."""

    rank_excess: float
    """Work of the slowest rank over the mean, minus 1: the time that other ranks wait."""
    micro_batches: float
    """Micro-batches of a rank per step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheWork:
    """What the reference cache still needs."""

    hits: int
    """Sequences that are in the cache."""
    misses: int
    hours: float
    """Time for the missing sequences."""
    bytes: int
    """Size of their rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Everything that `dpo plan` reports."""

    model: ModelConfig
    train: TrainConfig
    machine: Machine
    shape: Shape
    notes: list[str]
    data: dict[str, SampledData]
    steps: int
    balance: Balance
    ways: list[Way]
    """With activations recomputed if the advice says so."""
    advice: Advice
    step_flops: float
    """Operations of one step over all ranks, recomputation included."""
    hours: float
    sent_bytes: float
    """By a rank in a step."""
    reference: CacheWork
    updates: int
    """How often the reference moves."""
    update_hours: float
    """Time of all of these updates together."""
    checkpoint_bytes: int
    model_bytes: int


def make_plan(
    model: ModelConfig,
    data: DataConfig,
    reference: ReferenceConfig,
    train: TrainConfig,
    machine: Machine,
    *,
    exact: bool,
    whole_step: bool = False,
    mismatched: bool = False,
) -> Plan:
    """Plans a training run.

    Args:
        model: The policy.
        data: The preferences.
        reference: The reference model and its cache.
        train: The optimizer, the batches and the length of the run.
        machine: What it is to run on.
        exact: Tokenize all data instead of a sample.
        whole_step: Whether the loss needs the whole step, and so a cached gradient.
        mismatched: Whether the loss needs completions of other prompts; see `dpo.data.mismatched`.

    Raises:
        UserError: The model or the data does not exist, or the policy cannot be trained.
    """
    check_model_path(model.name_or_path, "model.name_or_path")
    check_policy(model)
    described = _described(model)
    with torch.device("meta"):
        bare = empty_policy(described, model, dtype=DTYPES[model.dtype])
    shape, work = shape_of(bare, quantization=model.quantization), work_of(bare)
    machine = machine.running(shape.parameters)
    splits = sample_data(
        data, load_tokenizer(model), max_positions(model), exact=exact, mismatched=mismatched
    )
    batches = BatchPlan(
        splits["train"].pairs_per_group,
        seed=train.seed,
        num_epochs=train.num_epochs,
        pairs_per_step=train.pairs_per_step,
        max_steps=train.max_steps,
    )
    of_optimizer = state_bytes(bare, train.optimizer) / shape.trainable
    needed = whole_step or train.backward == "cached" or model.router_aux_loss_weight > 0

    most_tokens = _most_tokens(batches, splits["train"], machine.num_gpus)

    def fit_with(*, cached: bool) -> Fit:
        return Fit(
            model,
            train,
            described,
            shape,
            splits["train"],
            machine,
            state_bytes=of_optimizer,
            most_tokens=most_tokens,
            cached=cached,
        )

    fit = fit_with(cached=needed)
    if fit.advice().sharding is None and train.backward == "auto" and not needed:
        fit = fit_with(cached=True)
    advice = fit.advice()
    balance = _balance(batches, splits["train"], machine.num_gpus, advice)
    # All but the last of a rank's pieces are scored once before.
    scored = balance.micro_batches - 1 if advice.cached else 0.0
    messages = traffic(
        advice.sharding or "ZeRO-3",
        shape,
        world_size=machine.num_gpus,
        dtype=DTYPES[model.dtype],
        micro_batches=balance.micro_batches,
        scored=scored,
    )
    # Forward pass, gradients of inputs and of trained weights, and the forward pass again if recomputed.
    again = recomputed_share(bare, advice.gradient_checkpointing)
    passes = 2 + shape.trainable / shape.parameters + again
    passes += scored / balance.micro_batches
    forward = _forward_flops_of_run(batches, splits["train"], work)
    flops, updates = passes * forward, num_updates(reference.update_every, batches.num_steps)
    after_first = 1 - reference.update_every / batches.num_steps if updates else 0.0
    steps, passes_per_step = batches.num_steps, balance.micro_batches * machine.num_gpus
    launches = launch_note(
        fit.operations(advice),
        flops / steps / passes_per_step,
        useful_flops=machine.useful_flops,
        tokens=advice.max_tokens_per_micro_batch,
    )
    return Plan(
        model=model,
        train=train,
        machine=machine,
        shape=shape,
        notes=[*_notes(model, train, shape, machine), *([launches] if launches else [])],
        data=splits,
        steps=batches.num_steps,
        balance=balance,
        ways=fit.ways(recomputed=advice.gradient_checkpointing),
        advice=advice,
        step_flops=flops / batches.num_steps,
        hours=flops * (1 + balance.rank_excess) / machine.flops_per_hour,
        sent_bytes=sent(messages, machine.num_gpus),
        reference=_cache_work(model, reference, splits, work, machine),
        updates=updates,
        update_hours=after_first * forward / machine.flops_per_hour,
        checkpoint_bytes=checkpoint_bytes(
            shape.trainable, DTYPES[model.dtype], train, sharded=advice.sharding != "no DeepSpeed"
        ),
        model_bytes=exported_bytes(model, _base_parameters(model, shape), shape.trainable),
    )


def _described(model: ModelConfig) -> PreTrainedConfig:
    try:
        return load_config(model)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"model.name_or_path: {model.name_or_path} has no config.json that can be read; expected a model "
            f"folder or a hub name: {first}"
        ) from error


def _notes(model: ModelConfig, train: TrainConfig, shape: Shape, machine: Machine) -> list[str]:
    notes, base = [], base_of(model)
    if not weights_at_hand(base):
        notes.append("the weights are not on this machine: parameters are counted from the configuration")
    elif (held := num_parameters(base)) < (expected := _base_parameters(model, shape)):
        notes.append(
            f"the weight files hold {held:,} parameters and the configuration describes "
            f"{expected:,}: an incomplete download?"
        )
    if machine.num_gpus > 1 and (reason := OPTIMIZERS[train.optimizer].not_sharded):
        notes.append(f"{train.optimizer} {reason}: every GPU holds all of it, without DeepSpeed")
    if train.pairs_per_step < machine.num_gpus:
        notes.append(
            f"train.pairs_per_step is {train.pairs_per_step}: at most that many of {machine.num_gpus} GPUs "
            "have work in a step"
        )
    return notes


def _base_parameters(model: ModelConfig, shape: Shape) -> int:
    """Parameters without those of an adapter."""
    return shape.parameters - (shape.trainable if model.lora is not None else 0)


def _balance(batches: BatchPlan, train: SampledData, ranks: int, advice: Advice) -> Balance:
    """Averages over `SAMPLED_STEPS` steps that are spread over the run."""
    budget = advice.max_tokens_per_micro_batch
    numbers = np.unique(np.linspace(1, batches.num_steps, SAMPLED_STEPS).astype(int))
    slowest, mean, micro_batches = 0.0, 0.0, []
    for number in numbers:
        groups = train.stand_in[batches.step(int(number)).groups]
        sizes = train.sample.sizes(groups, "packed")
        shares = share(sizes, world_size=ranks, budget=budget)
        loads = [sizes.work[np.concatenate(own).astype(int)].sum() for own in shares]
        slowest, mean = slowest + float(np.max(loads)), mean + float(np.mean(loads))
        cuts = [[_num_pieces(train, groups[batch], budget) for batch in own] for own in shares]
        micro_batches.append(max(map(sum, cuts)) if advice.cached else len(shares[0]))
    return Balance(rank_excess=slowest / mean - 1, micro_batches=float(np.mean(micro_batches)))


def _num_pieces(train: SampledData, groups: Int64s, budget: int) -> int:
    """Pieces of a micro-batch of these groups of the sample."""
    trees = (train.sample[int(group)] for group in groups)
    return len(cut([(tree.prompt, tree.completions) for tree in trees], "packed", budget))


def _most_tokens(batches: BatchPlan, train: SampledData, ranks: int) -> int:
    """Tokens that the most loaded rank gets of a step, over `SAMPLED_STEPS` steps of the run."""
    numbers = np.unique(np.linspace(1, batches.num_steps, SAMPLED_STEPS).astype(int))
    steps = (train.stand_in[batches.step(int(number)).groups] for number in numbers)
    work = [train.sample.sizes(groups, "packed").work for groups in steps]
    return max(int(of.sum()) // ranks + int(of.max()) for of in work)


def _forward_flops_of_run(batches: BatchPlan, train: SampledData, work: Work) -> float:
    """Operations of one forward pass over all steps."""
    epoch = float(forward_flops(train.sample, work)[train.stand_in].sum())
    steps_per_epoch = batches.num_steps / batches.step(batches.num_steps).epoch
    return epoch * batches.num_steps / max(1, steps_per_epoch)


def _cache_work(
    model: ModelConfig,
    reference: ReferenceConfig,
    splits: dict[str, SampledData],
    work: Work,
    machine: Machine,
) -> CacheWork:
    """Looks the sampled sequences up in the cache; estimates the rest.

    A model whose files have not been hashed yet counts as not cached: hashing takes minutes.
    """
    source, cache_dir = reference_model(model, reference), Path(reference.cache_dir)
    store = None
    if weights_at_hand(base_of(source)) and is_remembered(source, cache_dir):
        store = ReferenceStore(cache_dir, reference_identity(source, cache_dir))
    hits, sequences, flops = 0.0, 0, 0.0
    for split in splits.values():
        found = 0.0
        if store is not None and store.path.is_dir():
            found = float(np.mean(store.load().index.find(split.sample.keys) >= 0))
        hits += found * split.sequences
        sequences += split.sequences
        flops += (1 - found) * float(forward_flops(split.sample, work)[split.stand_in].sum())
    misses = sequences - round(hits)
    train = splits["train"]
    tokens_per_row = float(train.sample.completion_tokens.sum()) * train.scale / train.sequences
    row_bytes = CACHE_ROW_BYTES + (CACHE_TOKEN_BYTES * tokens_per_row if reference.store_token_logps else 0)
    return CacheWork(
        hits=round(hits),
        misses=misses,
        hours=flops / machine.flops_per_hour,
        bytes=round(misses * row_bytes),
    )
