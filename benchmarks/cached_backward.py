"""Memory and time of a step on one large group, with a cached gradient and with a direct one.

    python -m benchmarks.cached_backward                       the table of docs/losses.md

A prompt of 128 tokens with 16 completions of 512, the shape of GPT-2 124M with random weights, float32. All
ways take turns in one process on the same weights; their loss and gradient norm must agree.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dpo.config import LossConfig, ModelConfig, TrainConfig
from dpo.data.dataset import TokenizedDataset, map_dataset, write_dataset
from dpo.data.plan import BatchPlan
from dpo.data.preference_data import preference_data
from dpo.data.records import Pair, TokenizedGroup
from dpo.data.trees import sequence_batch
from dpo.engine import world
from dpo.engine.engine import Engine
from dpo.guards.guard import Guard
from dpo.model.load import load_model
from dpo.planning.live_bytes import LiveBytes
from dpo.tracking.run_folder import RunFolder
from dpo.train import loop
from dpo.train.preference_objective import PreferenceObjective
from dpo.train.resume import Settings
from dpo.train.session import Session

PROMPT, COMPLETION, COMPLETIONS = 128, 512, 16
WHOLE = PROMPT + COMPLETIONS * COMPLETION
PIECES = (4, 3, 2, 1)
"""Completions of a piece."""
AGREE = 1e-4
"""Largest relative difference of loss and gradient norm from those of the direct way."""


class Measured(NamedTuple):
    """One step."""

    seconds: float
    activation_bytes: int
    """Most bytes at once besides weights, gradients and optimizer state."""
    loss: float
    grad_norm: float


def large_group(folder: Path, vocabulary: int) -> TokenizedDataset:
    """The group of random ids; its first completion is preferred to all others."""
    ids = np.random.default_rng(0).integers(vocabulary, size=WHOLE, dtype=np.int32)
    completions = tuple(ids[start : start + COMPLETION] for start in range(PROMPT, WHOLE, COMPLETION))
    pairs = tuple(Pair(0, rejected) for rejected in range(1, COMPLETIONS))
    group = TokenizedGroup(prompt=ids[:PROMPT], completions=completions, pairs=pairs)
    write_dataset([group], folder, Counter())
    return map_dataset(folder, "large group")


def session_of(folder: Path, config: GPT2Config) -> Session:
    """A run of steps on that group; its way is chosen by its options."""
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(folder / "model")
    model = ModelConfig(name_or_path=str(folder / "model"), dtype="float32")
    options = TrainConfig(learning_rate=1e-6, warmup_steps=0, pairs_per_step=COMPLETIONS - 1, num_epochs=1000)
    data = large_group(folder / "data", config.vocab_size)
    engine = Engine(world.start(model), load_model(model), model, options)
    run = RunFolder(folder / "run")
    run.path.mkdir()
    reference = np.full(COMPLETIONS, -float(COMPLETION) * np.log(config.vocab_size))
    return Session(
        folder=run,
        settings=Settings({}),
        model=model,
        options=options,
        engine=engine,
        objective=PreferenceObjective(
            data=preference_data(data, reference), loss_config=LossConfig(beta=0.01), dtype="float32"
        ),
        plan=BatchPlan(
            data.pairs_per_group, seed=0, num_epochs=1000, pairs_per_step=COMPLETIONS - 1, max_steps=None
        ),
        tokenizer=PreTrainedTokenizerFast.__new__(PreTrainedTokenizerFast),  # nothing is decoded
        description="one group",
        guard=Guard(run, "train", 3600),
    )


def warm_up(session: Session) -> None:
    """A short pass, after which threads and library code are there."""
    ids = np.arange(COMPLETION, dtype=np.int32)
    session.engine.score(sequence_batch([(ids, ids)])).sum().backward()


def measure(session: Session, backward: str, budget: int) -> Measured:
    """One step, without its update: the learning rate is 0."""
    session.options = replace(session.options, backward=backward, max_tokens_per_micro_batch=budget)  # type: ignore[arg-type]
    parameters = list(session.engine.model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    live = LiveBytes([*parameters, *(p.grad for p in parameters if p.grad is not None)])
    with closing(loop.batches_of(session)) as batches, live:
        started = time.perf_counter()
        values, _, _ = loop.train_step(session, batches, 0.0)
        seconds = time.perf_counter() - started
    return Measured(seconds, live.peak, values["loss"], values["grad_norm"])


def table(found: dict[str, list[Measured]]) -> list[str]:
    """A Markdown table: medians over the rounds, and their ratios to the direct way."""

    def of(way: str) -> tuple[float, float]:
        return (
            statistics.median(one.seconds for one in found[way]),
            statistics.median(one.activation_bytes for one in found[way]),
        )

    direct_seconds, direct_bytes = of("direct")
    lines = ["| gradient | activations | time |", "|---|---:|---:|"]
    for way in found:
        seconds, size = of(way)
        lines.append(
            f"| {way} | {size / 1e9:.2f} GB: {direct_bytes / size:.1f} times less | "
            f"{seconds / direct_seconds:.2f} |"
        )
    lines[2] = f"| direct | {direct_bytes / 1e9:.2f} GB | 1 ({direct_seconds:.0f} s) |"
    return lines


def main() -> int:
    """Measures and prints the table; status 1 where the ways disagree."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.cached_backward", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=1, help="steps of each way")
    parser.add_argument("--completions", type=int, nargs="+", default=PIECES, help="of a piece, one row each")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model")
    args = parser.parse_args()
    ways = {"direct": ("direct", WHOLE)}
    for number in args.completions:
        name = f"cached, {number} completion{'s' if number > 1 else ''} at once"
        ways[name] = ("cached", PROMPT + number * COMPLETION)
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory() as folder:
        config = GPT2Config(n_layer=args.layers, bos_token_id=0, eos_token_id=0)
        session = session_of(Path(folder), config)
        with session.guard, session.opened():
            warm_up(session)
            for _ in range(args.rounds):
                for name, (backward, budget) in ways.items():
                    found[name].append(measure(session, backward, budget))
                    print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    print(*table(found), sep="\n")
    expected = found["direct"][0]
    return int(
        any(
            abs(one.loss / expected.loss - 1) > AGREE or abs(one.grad_norm / expected.grad_norm - 1) > AGREE
            for several in found.values()
            for one in several
        )
    )


if __name__ == "__main__":
    sys.exit(main())
