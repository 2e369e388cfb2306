"""Memory and time of a step on one large group, with a cached gradient and with a direct one.

    python -m benchmarks.cached_backward                the table of docs/losses.md: 10 GB of memory, minutes
    python -m benchmarks.cached_backward --rounds 0     what `dpo plan` expects of the memory, in seconds

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
from dpo.model.flops import forward_flops, work_of
from dpo.model.load import load_model
from dpo.planning.live_bytes import LiveBytes
from dpo.planning.rehearsal import rehearse
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


class Planned(NamedTuple):
    """What `dpo plan` expects of a step on a GPU."""

    activation_bytes: int
    operations: float


def planned(config: GPT2Config, completions: int) -> Planned:
    """Memory and operations of a step in pieces of so many completions; of all of them, the direct way."""
    model = ModelConfig(name_or_path="gpt2", dtype="float32")
    prompt, completion = np.zeros(PROMPT, dtype=np.int32), np.zeros(COMPLETION, dtype=np.int32)
    firsts = range(0, COMPLETIONS, completions)
    pieces = [[completion] * min(completions, COMPLETIONS - first) for first in firsts]
    peak = rehearse(config, model, [(prompt, pieces[0])], dtype=torch.float32, gpu=True).peak
    groups = [TokenizedGroup(prompt=prompt, completions=tuple(piece), pairs=()) for piece in pieces]
    with torch.device("meta"):
        work = work_of(GPT2LMHeadModel(config))
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(groups, Path(folder) / "pieces", Counter())
        forward = forward_flops(map_dataset(Path(folder) / "pieces", "pieces"), work)
    backward, scored = 2 * forward.sum(), forward[:-1].sum()
    return Planned(peak, float(forward.sum() + backward + scored))


def table(found: dict[str, list[Measured]], expected: dict[str, Planned]) -> list[str]:
    """A Markdown table of activations and time as planned and measured; medians over the rounds.

    Args:
        found: Way -> its steps, which may be none.
        expected: Way -> what is planned of it.
    """
    lines = ["| gradient | activations, planned | operations | activations, measured | time |"]
    lines += ["|---|---:|---:|---:|---:|"]
    for way, steps in found.items():
        plan, base = expected[way], expected["direct"]
        ratio = base.activation_bytes / plan.activation_bytes
        size = f"{plan.activation_bytes / 1e9:.2f} GB: {ratio:.1f} times less"
        measured = time_of = ""
        if steps:
            own, direct = statistics.median(s.activation_bytes for s in steps), found["direct"]
            whole = statistics.median(s.activation_bytes for s in direct)
            measured = f"{own / 1e9:.2f} GB: {whole / own:.1f} times less"
            seconds = [statistics.median(s.seconds for s in of) for of in (steps, direct)]
            time_of = f"{seconds[0] / seconds[1]:.2f}"
        operations = f"{plan.operations / base.operations:.2f}"
        lines.append(f"| {way} | {size} | {operations} | {measured} | {time_of} |")
    return [line.replace(": 1.0 times less", "") for line in lines]


def main() -> int:
    """Measures and prints the table; status 1 where the ways disagree."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.cached_backward", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=1, help="steps of each way; 0: only plan the memory")
    parser.add_argument("--completions", type=int, nargs="+", default=PIECES, help="of a piece, one row each")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model")
    args = parser.parse_args()
    config = GPT2Config(n_layer=args.layers, bos_token_id=0, eos_token_id=0)
    ways, expected = {"direct": ("direct", WHOLE)}, {"direct": planned(config, COMPLETIONS)}
    for number in args.completions:
        name = f"cached, {number} completion{'s' if number > 1 else ''} at once"
        ways[name] = ("cached", PROMPT + number * COMPLETION)
        expected[name] = planned(config, number)
    found: dict[str, list[Measured]] = {name: [] for name in ways}
    if not args.rounds:
        print(*table(found, expected), sep="\n")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        session = session_of(Path(folder), config)
        with session.guard, session.opened():
            warm_up(session)
            for _ in range(args.rounds):
                for name, (backward, budget) in ways.items():
                    found[name].append(measure(session, backward, budget))
                    print(f"{name}: {found[name][-1]}", file=sys.stderr, flush=True)
    print(*table(found, expected), sep="\n")
    direct = found["direct"][0]
    return int(
        any(
            abs(one.loss / direct.loss - 1) > AGREE or abs(one.grad_norm / direct.grad_norm - 1) > AGREE
            for several in found.values()
            for one in several
        )
    )


if __name__ == "__main__":
    sys.exit(main())
