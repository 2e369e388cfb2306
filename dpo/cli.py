"""The command line: configuration in, exit status out.

YAML and dotted overrides become a `Config`; all problems of it are shown at once. Commands are imported late,
so that `--help` does not load torch. Exit status: 0 done, 2 bad usage, configuration or data, 3 stopped by a
signal after saving, 1 anything else; rank 0 also writes it to RUN_DIR/exit.json, because `accelerate launch`
turns every failure into 1.
"""

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from dpo import terminal
from dpo.arguments import COMMANDS, nearest, parse
from dpo.config import Config, SftConfig
from dpo.ending import record_end
from dpo.errors import RunFailed, StoppedBySignal, UserError

USAGE = """usage: dpo COMMAND --config FILE [--KEY VALUE ...]

Direct Preference Optimization with an offline reference cache.

commands:
{commands}
  cache ACTION     info, verify or prune: look after the reference cache; see dpo cache --help
  plan             memory, time and disk of a run, before it is started; see dpo plan --help
  check [COMMAND]  validate a configuration and its data for COMMAND (default: train); loads no model

dpo COMMAND --help lists every key. --quiet leaves warnings, errors and the summary; --json_lines makes
standard output one JSON object a line.
Several processes: accelerate launch --config_file launch/cpu.yaml -m dpo ...
"""


CACHE_USAGE = """usage: dpo cache info   FOLDER | --config FILE [--KEY VALUE ...]
       dpo cache verify FOLDER | --config FILE [--KEY VALUE ...] [--recompute N]
       dpo cache prune  FOLDER | --config FILE [--KEY VALUE ...] [--and_config FILE ...] [--dry_run]

FOLDER is a cache (it holds identity.json) or a root with caches in it; FILE is an experiment, as for train.

info    identity, rows, bytes and shards; with FILE also how much of its data is covered
verify  reads every shard and checks it; --recompute computes N random rows of FILE's data anew and compares
prune   joins small shards; with FILE also drops the rows that neither it nor any --and_config needs
"""


PLAN_USAGE = """usage: dpo plan --config FILE --num_gpus N --gpu_memory 80GB [--KEY VALUE ...]
                [--gpu_tflops 989] [--mfu 0.4] [--exact] [--json]

What training FILE will need on N GPUs: data and steps, memory of each GPU for every way of sharding, the
largest micro-batch, time, disk, and which way to take. Reads configurations, headers and data; loads no
weight.

--gpu_memory  of one GPU: 80GB, 24GiB
--gpu_tflops  peak of one GPU in the compute type; default: 989, an H100's dense bfloat16
--mfu         share of that peak that useful operations reach; default: 0.4, an assumption: measure yours
--exact       tokenize all data, as training does, instead of a sample of 2,000 groups
--json        numbers for scripts, in bytes, hours, tokens and operations
"""


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status."""
    commands = "\n".join(f"  {name:<16} {summary}" for name, summary in COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(commands=commands))
        return 0 if arguments else 2
    command, *rest = arguments
    if command == "cache":
        return _cache(rest)
    if command == "plan":
        return _plan(rest)
    run_dir: Path | None = None
    started = time.time()
    rest = _choose_output(rest)
    try:
        only_check = command == "check"
        if only_check:
            command = rest.pop(0) if rest and not rest[0].startswith("-") else "train"
        if command not in COMMANDS:
            raise UserError(
                f"no command {command}{nearest(command, [*COMMANDS, 'cache', 'check', 'plan'])}; "
                "see dpo --help"
            )
        config = parse(command, rest)
        run_dir = None if only_check else Path(config.run_dir)
        _execute(command, config, only_check=only_check)
    except UserError as error:
        _say(f"dpo: error: {error}")
        return _finish(run_dir, command, 2, str(error), started)
    except StoppedBySignal as stopped:
        if os.environ.get("RANK", "0") == "0":  # all ranks stop together
            _say(f"dpo: stopped by a signal: {stopped}")
        return _finish(run_dir, command, 3, str(stopped), started)
    except RunFailed as failed:
        _say(f"dpo: failed: {failed}")
        return _finish(run_dir, command, 1, str(failed), started)
    except KeyboardInterrupt:
        _say("dpo: interrupted")
        return _finish(run_dir, command, 1, "interrupted", started)
    except Exception as error:
        _finish(run_dir, command, 1, f"{type(error).__name__}: {error}", started)
        raise
    return _finish(run_dir, command, 0, "done", started)


def _choose_output(arguments: Sequence[str]) -> list[str]:
    """Takes --quiet and --json_lines out of the arguments; the last one counts, also for child processes."""
    for flag in arguments:
        if flag in terminal.FLAGS:
            os.environ[terminal.OUTPUT] = terminal.FLAGS[flag]
    return [argument for argument in arguments if argument not in terminal.FLAGS]


def _cache(arguments: Sequence[str]) -> int:
    """`dpo cache`: its own options here, all others are keys of the configuration."""
    if not arguments or any(word in ("-h", "--help") for word in arguments):
        print(CACHE_USAGE)
        return 0 if arguments else 2
    action, *rest = arguments
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.set_defaults(recompute=0, and_config=[], dry_run=False)
    if action == "verify":
        parser.add_argument("--recompute", type=int)
    if action == "prune":
        parser.add_argument("--and_config", action="append")
        parser.add_argument("--dry_run", action="store_true")
    try:
        if action not in ("info", "verify", "prune"):
            raise UserError(f"no action {action}; expected info, verify or prune: see dpo cache --help")
        folder = Path(rest.pop(0)) if rest and not rest[0].startswith("-") else None
        options, keys = parser.parse_known_args(rest)
        needless = [*keys, *(["--and_config"] if options.and_config else [])]
        if folder is None and not keys:
            raise UserError("expected a folder or --config FILE: see dpo cache --help")
        if folder is not None and needless:
            raise UserError(
                f"{needless[0]}: dpo cache {action} FOLDER does not take it: see dpo cache --help"
            )
        if options.recompute < 0:
            raise UserError(f"--recompute: {options.recompute}; expected a number of rows, at least 0")
        others = [cast(Config, parse("precompute-ref", ["--config", name])) for name in options.and_config]
        target = folder or cast(Config, parse("precompute-ref", keys))
        from dpo import cache

        if action == "info":
            cache.show_info(target)
        elif action == "verify":
            cache.verify_caches(target, recompute=options.recompute)
        else:
            cache.prune_caches(target, others, dry_run=options.dry_run)
    except (UserError, argparse.ArgumentError) as error:
        _say(f"dpo: error: {error}")
        return 2
    return 0


def _plan(arguments: Sequence[str]) -> int:
    """`dpo plan`: its own options here, all others are keys of the configuration."""
    if not arguments or any(word in ("-h", "--help") for word in arguments):
        print(PLAN_USAGE)
        return 0 if arguments else 2
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--num_gpus", type=int)
    parser.add_argument("--gpu_memory")
    parser.add_argument("--gpu_tflops", type=float, default=989.0)
    parser.add_argument("--mfu", type=float, default=0.4)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--json", action="store_true")
    try:
        options, keys = parser.parse_known_args(list(arguments))
        given = options.gpu_memory or "missing"
        size = _bytes(given)
        wrong = [
            *(["--num_gpus: expected how many, at least 1"] if (options.num_gpus or 0) < 1 else []),
            *([f"--gpu_memory: {given}; expected the size of one GPU, such as 80GB"] if not size else []),
            *([f"--mfu: {options.mfu}; expected a share in (0, 1]"] if not 0 < options.mfu <= 1 else []),
            *(
                [f"--gpu_tflops: {options.gpu_tflops}; expected above 0"]
                if not options.gpu_tflops > 0
                else []
            ),
        ]
        if wrong:
            raise UserError("; ".join(wrong) + ": see dpo plan --help")
        config = cast(Config, parse("train", keys))
        from dpo.commands import plan

        plan(
            config,
            num_gpus=options.num_gpus,
            gpu_memory=size,
            gpu_flops=options.gpu_tflops * 1e12,
            mfu=options.mfu,
            exact=options.exact,
            as_numbers=options.json,
        )
    except (UserError, argparse.ArgumentError) as error:
        _say(f"dpo: error: {error}")
        return 2
    return 0


def _bytes(size: str) -> int:
    """80GB -> 80,000,000,000 and 1GiB -> 1,073,741,824; 0 for what is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", size.strip(), re.IGNORECASE)
    if found is None:
        return 0
    number, prefix, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(prefix.upper() or " "))


def _execute(command: str, config: Config | SftConfig, *, only_check: bool) -> None:
    from dpo import checking, commands

    if only_check:
        checking.check(command, config)
    elif isinstance(config, SftConfig):
        commands.sft(config)
    else:
        {"precompute-ref": commands.precompute_ref, "train": commands.train, "evaluate": commands.evaluate}[
            command
        ](config)


def _finish(run_dir: Path | None, command: str, status: int, message: str, started: float) -> int:
    """Leaves RUN_DIR/exit.json for scripts, from rank 0."""
    terminal.event("end", {"command": command, "status": status, "message": message})
    if run_dir is not None and os.environ.get("RANK", "0") == "0":
        record_end(run_dir, command, status, message, started)
    return status


def _say(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr, flush=True)
