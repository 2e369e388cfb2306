"""Commands with options of their own: their table, and cache, data, plan, compare and frontier."""

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from dpo.cli import chat, convert, init, rounds
from dpo.cli.help import fitted
from dpo.cli.parse import parse
from dpo.config import Config
from dpo.errors import UserError

LARGEST_IN_GB = 10_000
"""A size without a unit is in GB below this, and in bytes from it on."""
CACHE_USAGE = """usage: dpo cache info   FOLDER | --config FILE [--KEY VALUE ...]
       dpo cache verify FOLDER | --config FILE [--KEY VALUE ...] [--recompute N]
       dpo cache prune  FOLDER | --config FILE [--KEY VALUE ...] [--and_config FILE ...] [--dry_run]

FOLDER is a cache (it holds identity.json) or a root with caches in it; FILE is an experiment, as for train.

info    identity, rows, bytes and shards; with FILE also how much of its data is covered
verify  reads every shard and checks it; --recompute computes N random rows of FILE's data anew and compares
prune   joins small shards; with FILE also drops the rows that neither it nor any --and_config needs
"""


PLAN_USAGE = """usage: dpo plan --config FILE --num_gpus N --gpu_memory 80GB [--KEY VALUE ...]
                [--gpu_tflops 989] [--mfu 0.3] [--exact] [--json]

What training FILE will need on N GPUs: data and steps, memory of each GPU for every way of sharding, the
largest micro-batch, time, disk, and which way to take. Reads configurations, headers and data; loads no
weight.

--gpu_memory  of one GPU: 80GB, or 80 for the same, 24GiB
--gpu_tflops  peak of one GPU in the compute type; default: 989, an H100's dense bfloat16
--mfu         share of that peak that useful operations reach; default: estimated by the model's size, not
              measured (docs/gpu.md): perf/mfu of a run is yours
--exact       tokenize all data, as training does, instead of a sample of 2,000 groups
--json        numbers for scripts, in bytes, hours, tokens and operations
"""


DATA_USAGE = """usage: dpo data --config FILE [--ches N] [--output FOLDER] [--KEY VALUE ...]

What the preferences of FILE hold: rows and what was dropped, lengths, shared prompts, pairs that repeat or
contradict each other, whether the labels prefer length, what held-out data shares with training, and, as far
as the reference cache is filled, which labels look flipped. Tokenizes as training does; loads no model
without --ches.

--ches    score N random training pairs with the model that training starts from: CHES (arXiv 2410.08847)
          tells where the chosen completion's log-prob will fall; 256 are enough for a median
--output  where data.html, data.md, summary.json, pairs.jsonl and figures go; default: data_report
"""


COMPARE_USAGE = """usage: dpo compare RUN_A RUN_B ... [--output FOLDER]

Runs side by side: the settings that differ, what was reached with intervals, how fast, and their curves in
one figure. Reads run folders; a run without a report is compared by its curves alone.

--output  where comparison.md, comparison.json and the figures go; default: comparison
"""


FRONTIER_USAGE = """usage: dpo frontier --config FILE [--betas 0.05,0.1,0.3,1] [--snapshot_every N] [--no_sft]
                    [--sft_learning_rate 1e-5] [--best_of] [--launcher COMMAND] [--output FOLDER]
                    [--KEY VALUE ...]

Trains FILE with several betas on one reference cache, and fine-tunes on the chosen completions as a baseline;
evaluates each, and draws score against KL. Run the same command again to continue: finished parts are kept.

--betas              strengths of the pull towards the reference; default: 0.05,0.1,0.3,1
--snapshot_every     also evaluate each run every N optimizer steps
--no_sft             leave the baseline out
--sft_learning_rate  of the baseline; default: 1e-5
--best_of            also draw best of n samples of the reference, and the score that no policy exceeds at
                     a KL, from evaluate.reference_samples of each prompt; evaluate.temperature must be 1
--launcher           what starts a stage, before its name; default: launch/run where there is one, else this
                     interpreter alone
--output             default: the configuration's run_dir with _frontier behind it
"""


def run_tool(command: str, arguments: Sequence[str]) -> int:
    """Runs a command of `dpo.cli.table.TOOLS` and returns the exit status; raises as commands do."""
    usage, tool = _TOOLS[command]
    if not arguments or any(word in ("-h", "--help") for word in arguments):
        print(fitted(usage), end="")
        return 0 if arguments else 2
    try:
        return tool(list(arguments))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error


def _cache(arguments: list[str]) -> int:
    """`dpo cache`: its own options here, all others are keys of the configuration."""
    action, *rest = arguments
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.set_defaults(recompute=0, and_config=[], dry_run=False)
    if action == "verify":
        parser.add_argument("--recompute", type=int)
    if action == "prune":
        parser.add_argument("--and_config", action="append")
        parser.add_argument("--dry_run", action="store_true")
    if action not in ("info", "verify", "prune"):
        raise UserError(f"no action {action}; expected info, verify or prune: see dpo cache --help")
    folder = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
    options, keys = parser.parse_known_args(rest)
    needless = [*keys, *(["--and_config"] if options.and_config else [])]
    if folder is None and not keys:
        raise UserError("expected a folder or --config FILE: see dpo cache --help")
    if folder is not None and needless:
        raise UserError(f"{needless[0]}: dpo cache {action} FOLDER does not take it: see dpo cache --help")
    if options.recompute < 0:
        raise UserError(f"--recompute: {options.recompute}; expected a number of rows, at least 0")
    others = [cast(Config, parse("precompute-ref", ["--config", name])) for name in options.and_config]
    target = folder or cast(Config, parse("precompute-ref", keys))
    from dpo.commands import cache

    if action == "info":
        cache.show_info(target)
    elif action == "verify":
        cache.verify_caches(target, recompute=options.recompute)
    else:
        cache.prune_caches(target, others, dry_run=options.dry_run)
    return 0


def _plan(arguments: list[str]) -> int:
    """`dpo plan`: its own options here, all others are keys of the configuration."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--num_gpus", type=int)
    parser.add_argument("--gpu_memory")
    parser.add_argument("--gpu_tflops", type=float, default=989.0)
    parser.add_argument("--mfu", type=float, default=None)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--json", action="store_true")
    options, keys = parser.parse_known_args(list(arguments))
    given = options.gpu_memory or "missing"
    size, share = _bytes(given), 1.0 if options.mfu is None else options.mfu
    wrong = [
        *(["--num_gpus: expected how many, at least 1"] if (options.num_gpus or 0) < 1 else []),
        *([f"--gpu_memory: {given}; expected the size of one GPU, such as 80GB"] if not size else []),
        *([f"--mfu: {options.mfu}; expected a share in (0, 1]"] if not 0 < share <= 1 else []),
        *([f"--gpu_tflops: {options.gpu_tflops}; expected above 0"] if not options.gpu_tflops > 0 else []),
    ]
    if wrong:
        raise UserError("; ".join(wrong) + ": see dpo plan --help")
    config = cast(Config, parse("train", keys))
    from dpo.commands.plan import plan

    plan(
        config,
        num_gpus=options.num_gpus,
        gpu_memory=size,
        gpu_flops=options.gpu_tflops * 1e12,
        mfu=options.mfu,
        exact=options.exact,
        as_numbers=options.json,
    )
    return 0


def _bytes(size: str) -> int:
    """80GB or 80 -> 80,000,000,000 and 1GiB -> 1,073,741,824; 0 for what is no size of a GPU."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", size.strip(), re.IGNORECASE)
    if found is None:
        return 0
    number, prefix, binary = found.groups()
    if not prefix:  # a number alone means GB, unless it is meant as bytes
        prefix = "G" if float(number) < LARGEST_IN_GB else ""
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def _data(arguments: list[str]) -> int:
    """`dpo data`: its own options here, all others are keys of the configuration."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--ches", type=int, default=0)
    parser.add_argument("--output", default="data_report")
    options, keys = parser.parse_known_args(arguments)
    if options.ches < 0:
        raise UserError(f"--ches: {options.ches}; expected a number of pairs: see dpo data --help")
    config = cast(Config, parse("train", keys))
    from dpo.commands.data_report import data_report

    command = shlex.join(["python", "-m", "dpo", "data", *arguments])
    data_report(config, num_ches=options.ches, output=Path(options.output), command=command)
    return 0


def _compare(arguments: list[str]) -> int:
    """`dpo compare`."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--output", default="comparison")
    options, folders = parser.parse_known_args(arguments)
    if unknown := [word for word in folders if word.startswith("-")]:
        raise UserError(f"{unknown[0]}: no such option: see dpo compare --help")
    from dpo.commands.compare import compare_runs

    compare_runs([Path(folder) for folder in folders], Path(options.output))
    return 0


def _frontier(arguments: list[str]) -> int:
    """`dpo frontier`: its own options here, all others are keys of the configuration."""
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--betas", default="0.05,0.1,0.3,1")
    parser.add_argument("--snapshot_every", type=int, default=0)
    parser.add_argument("--no_sft", action="store_true")
    parser.add_argument("--sft_learning_rate", type=float, default=1e-5)
    parser.add_argument("--best_of", action="store_true")
    parser.add_argument("--launcher")
    parser.add_argument("--output")
    options, keys = parser.parse_known_args(arguments)
    try:
        betas = [float(beta) for beta in options.betas.split(",")]
    except ValueError:
        betas = [0.0]
    wrong = [
        *(
            [f"--betas: {options.betas}; expected numbers above 0, each once, such as 0.1,0.3"]
            if not all(beta > 0 for beta in betas) or len({*betas}) < len(betas)
            else []
        ),
        *(
            [f"--snapshot_every: {options.snapshot_every}; expected at least 0"]
            if options.snapshot_every < 0
            else []
        ),
        *(
            [f"--sft_learning_rate: {options.sft_learning_rate}; expected above 0"]
            if not options.sft_learning_rate > 0
            else []
        ),
    ]
    if wrong:
        raise UserError("; ".join(wrong) + ": see dpo frontier --help")
    config = cast(Config, parse("train", keys))
    from dpo.commands.frontier import Sweep, run_frontier

    here = Path("launch/run")
    default = [str(here)] if here.is_file() else [sys.executable, "-m", "dpo"]
    run_frontier(
        Sweep(
            config=config,
            keys=keys,
            betas=betas,
            snapshot_every=options.snapshot_every,
            sft_learning_rate=None if options.no_sft else options.sft_learning_rate,
            best_of=options.best_of,
            launcher=shlex.split(options.launcher) if options.launcher else default,
            output=Path(options.output or f"{config.run_dir}_frontier"),
        )
    )
    return 0


_TOOLS: dict[str, tuple[str, Callable[[list[str]], int]]] = {
    "data": (DATA_USAGE, _data),
    "plan": (PLAN_USAGE, _plan),
    "frontier": (FRONTIER_USAGE, _frontier),
    "compare": (COMPARE_USAGE, _compare),
    "cache": (CACHE_USAGE, _cache),
    "rounds": (rounds.USAGE, rounds.run_rounds),
    "chat": (chat.USAGE, chat.run_chat),
    "init": (init.USAGE, init.run_init),
    "convert": (convert.USAGE, convert.run_convert),
}
