"""The prepared run, part C: training steps of whole models on one card.

    python -m benchmarks.gpu.throughput [--rehearse]

Tokens per second and useful operations over the peak, beside what `dpo plan` expects of that size; peak
memory beside what `dpo plan` counts; how long the host needs to launch a micro-batch, beside the card's time.
"""

import gc
import sys
import time
from functools import partial

import torch
from transformers import PreTrainedConfig

from benchmarks.gpu.report import Report, device, device_name, options
from benchmarks.gpu.work import batch_of, configs, groups_of, random_model, training_flops, wait
from dpo.config import LossConfig, ModelConfig, OptimizationConfig
from dpo.data.trees import TreeBatch
from dpo.engine import world
from dpo.engine.engine import Engine
from dpo.loss.pairs import pair_logps
from dpo.loss.preference_loss import preference_loss
from dpo.model.flops import known_peak, work_of
from dpo.model.probe_trees import trees_of
from dpo.planning.memory import rank_memory, shape_of
from dpo.planning.rehearsal import rehearse
from dpo.planning.speed import LAUNCH_SECONDS, expected_mfu

STEPS, WARM_UPS = 5, 2
LOSS = LossConfig()


def main() -> int:
    """Measures every model and returns the exit status."""
    given = options("throughput", __doc__)
    report = Report("throughput", given.rehearse, given.output, given.seconds)
    for name, config in configs(rehearse=given.rehearse).items():
        report.section(name, partial(train, report, config))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return report.finish()


def train(report: Report, config: PreTrainedConfig) -> None:
    """Trains a model with random weights for a few steps without DeepSpeed, in bfloat16."""
    tokens = 512 if report.rehearse else 16_384
    options = ModelConfig(
        name_or_path="", gradient_checkpointing=not report.rehearse and config.hidden_size > 2048
    )
    accelerator = world.start(options)
    model = random_model(config, torch.bfloat16, device())
    shape, work = shape_of(model), work_of(model)
    engine = Engine(accelerator, model, options, OptimizationConfig(learning_rate=1e-6))
    groups = groups_of(tokens, config.vocab_size)
    probed = engine.settle_layout(trees_of((groups[0].prompt, groups[0].completions)))
    print(f"  layout {probed.layout}; {' '.join(probed.notes)}")
    batch = batch_of(groups, engine.layout, device(), engine.windows)
    for _ in range(WARM_UPS):
        step(engine, batch)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()  # the probe's copy of the first blocks is gone
    launched, took = timed_steps(engine, batch)
    flops, peak = training_flops(groups, work), known_peak(device_name()) or 1e12
    report.number("parameters", shape.parameters / 1e6, "million")
    report.number("tokens per second", batch.num_real_tokens / took, "tokens/s")
    share = expected_mfu(shape.parameters)
    report.number(
        "useful operations over the peak", flops / took / peak, "", low=0.7 * share, high=1.5 * share
    )
    trees = [(group.prompt, group.completions) for group in groups]
    rehearsed = rehearse(config, options, trees, dtype=torch.bfloat16, gpu=True)
    memory = rank_memory("no DeepSpeed", shape, rehearsed, world_size=1, dtype=torch.bfloat16, state_bytes=8)
    if torch.cuda.is_available():
        used = float(torch.cuda.max_memory_allocated())
        report.number("peak memory over what plan counts", used / memory.total, "x", low=0.9, high=1.1)
    report.number("memory that plan counts", memory.total / 1e9, "GB")
    report.number("host time over device time of a step", launched / took, "x", high=0.8)
    report.number("operations of a micro-batch", rehearsed.operations, "")
    own = 1e6 * launched / rehearsed.operations
    report.number("host time of an operation", own, "us", high=2e6 * LAUNCH_SECONDS)


def step(engine: Engine, batch: TreeBatch) -> None:
    """One optimizer step of one micro-batch with the DPO loss and a reference of zeros."""
    assert batch.reference is not None
    policy = pair_logps(engine.score(batch), batch.pairs, batch.num_tokens)
    reference = pair_logps(batch.reference, batch.pairs, batch.num_tokens)
    losses = preference_loss(policy, reference, LOSS).losses
    engine.accumulate(losses.sum() / batch.loss_count, last=True)
    engine.update(1e-6)


def timed_steps(engine: Engine, batch: TreeBatch) -> tuple[float, float]:
    """Mean seconds in which the host has launched a micro-batch, and in which a whole step is done."""
    launched, began = 0.0, time.perf_counter()
    for _ in range(STEPS):
        wait()
        launching = time.perf_counter()
        loss = engine.score(batch).sum() * 0.0
        engine.accumulate(loss, last=True)
        launched += time.perf_counter() - launching
    wait()
    engine.update(0.0)
    began = time.perf_counter()
    for _ in range(STEPS):
        step(engine, batch)
    wait()
    return launched / STEPS, (time.perf_counter() - began) / STEPS


if __name__ == "__main__":
    sys.exit(main())
