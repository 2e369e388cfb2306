"""A plan as text: a page for people, and plain types for `dpo plan --json`."""

import textwrap
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from dpo.planning.data_sample import SampledData
from dpo.planning.fit import USABLE, Way
from dpo.planning.plan import Plan

PARTS = ("weights", "gradients", "optimizer", "activations", "projection", "buckets", "total", "host")
"""Rows of the memory table."""
INDENT = 11
"""Where the text of a line begins, after its label."""


def page(plan: Plan, width: int = 110) -> str:
    """The whole plan, in lines of at most `width` columns, at least 80."""
    text = [*_work(plan), "", *_advice(plan), "", *_time(plan)]
    place = text.index("")
    text[place + 1 : place + 1] = [*_memory(plan), ""]
    return "\n".join(part for line in text for part in _filled(line, max(width, 80)))


def _filled(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, subsequent_indent=" " * INDENT, break_on_hyphens=False)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan in plain types: bytes, hours and tokens as numbers."""
    return {
        "model": {"name_or_path": plan.model.name_or_path, **asdict(plan.shape)},
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
        **asdict(plan.balance),
        "max_tokens_per_micro_batch": plan.advice.max_tokens_per_micro_batch,
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
        "reference": asdict(plan.reference),
        "updates": plan.updates,
        "update_hours": plan.update_hours,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "model_bytes": plan.model_bytes,
    }


def _work(plan: Plan) -> Iterator[str]:
    model, shape = plan.model, plan.shape
    lora = f", {_count(shape.trainable)} of them in an adapter and trained" if model.lora else ""
    yield f"model      {model.name_or_path}: {_count(shape.parameters)} parameters{lora}, {model.dtype}"
    for note in plan.notes:
        yield f"{'':<{INDENT}}{note}"
    for name, split in plan.data.items():
        yield f"{name:<10} {split.pairs:,} pairs, {split.sequences:,} completions of {split.groups:,} prompts"
        yield f"           {_tokens(split)}, longest group {split.longest:,}"
        for reason, number in split.changed.items():
            kind, _, what = reason.partition("/")
            about = "" if split.exact else "about "
            yield f"           {kind} {what.replace('_', ' ')}: {about}{number:,.0f}"
    train, budget = plan.train, plan.advice.max_tokens_per_micro_batch
    yield (
        f"steps      {plan.steps:,} of {train.pairs_per_step} pairs, {train.num_epochs} epoch(s); "
        f"{plan.balance.micro_batches:.1f} micro-batches of {budget:,} tokens per rank"
    )
    yield (
        f"balance    the slowest of {plan.machine.num_gpus} ranks has {plan.balance.rank_excess:.1%} more "
        "work than the mean"
    )


def _tokens(split: SampledData) -> str:
    tokens = f"{_count(split.tokens.mean)} tokens"
    if not split.exact:
        half = (split.tokens.high - split.tokens.low) / 2 / split.tokens.mean
        tokens += f" +- {half:.1%} ({len(split.sample):,} groups tokenized; --exact tokenizes all)"
    return tokens


def _memory(plan: Plan) -> Iterator[str]:
    machine = plan.machine
    kinds = {"selective": "recomputed but those of attention", "full": "recomputed"}
    recomputed = kinds.get(str(plan.advice.gradient_checkpointing), "kept")
    yield (
        f"memory of each of {machine.num_gpus} GPU(s) in GB at the peak of a step, activations {recomputed};"
    )
    planned = f"{USABLE:.0%} of {machine.gpu_memory / 1e9:,.0f} GB are planned"
    yield f"{planned}; micro-batch: the largest that fits, in tokens"
    rows = [("", *(way.sharding for way in plan.ways))]
    rows += [(part, *(f"{getattr(way.memory, part) / 1e9:,.2f}" for way in plan.ways)) for part in PARTS]
    rows += [("micro-batch", *map(_largest, plan.ways))]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for label, *cells in rows:
        values = "".join(f"  {cell:>{size}}" for cell, size in zip(cells, widths[1:], strict=True))
        yield f"  {label:<{widths[0]}}{values}".rstrip()


def _largest(way: Way) -> str:
    return f"{way.largest_micro_batch:,}" if way.largest_micro_batch else "none fits"


def _advice(plan: Plan) -> Iterator[str]:
    advice = plan.advice
    if advice.sharding is None:
        yield f"advice     {advice.reason}"
        return
    yield f"advice     {advice.sharding}: {advice.launcher}"
    yield f"           --train.max_tokens_per_micro_batch {advice.max_tokens_per_micro_batch}"
    if advice.gradient_checkpointing:
        yield f"           --model.gradient_checkpointing {advice.gradient_checkpointing}"
    if advice.cached:
        yield "           --train.backward cached (pieces of a group, for a further forward pass)"
    yield f"           {advice.reason}"


def _time(plan: Plan) -> Iterator[str]:
    machine = plan.machine
    rate = f"{machine.gpu_flops / 1e12:,.0f} TFLOP/s x {machine.mfu:.0%}"
    reference = plan.reference
    yield (
        f"reference  {reference.hits:,} sequences are in the cache, {reference.misses:,} are not: "
        f"{_hours(reference.hours)}, {_bytes(reference.bytes)}"
    )
    if plan.updates:
        yield (
            f"           it moves {plan.updates} times, {_hours(plan.update_hours / plan.updates)} each: a "
            f"forward pass over the steps that follow, and {_bytes(plan.model_bytes)} on the disk"
        )
    yield (
        f"training   {plan.step_flops / 1e12:,.1f} TFLOP per step, {_hours(plan.hours)} on "
        f"{machine.num_gpus} GPU(s) at {rate}, without communication"
    )
    if plan.sent_bytes:
        yield f"network    each rank sends about {_bytes(plan.sent_bytes)} per step"
    train = plan.train
    checkpoints = (
        f"{train.keep_last} checkpoints of {_bytes(plan.checkpoint_bytes)}, and one more while it is written"
        if train.checkpoint_every
        else "no checkpoints (train.checkpoint_every: 0)"
    )
    yield f"disk       {checkpoints}; the model {_bytes(plan.model_bytes)}"


def _count(number: float) -> str:
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.2f}{name}"
    return f"{number:,.0f}"


def _bytes(number: float) -> str:
    for size, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if number >= size:
            return f"{number / size:.2f} {name}"
    return f"{number / 1e3:.0f} kB"


def _hours(hours: float) -> str:
    if hours >= 48:
        return f"{hours / 24:.1f} days"
    if hours >= 1:
        return f"{hours:.1f} hours"
    return f"{hours * 60:.1f} minutes" if hours >= 1 / 60 else f"{hours * 3600:.0f} seconds"
