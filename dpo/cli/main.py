"""The command line: configuration in, exit status out.

YAML and dotted overrides become a `Config`; all problems of it are shown at once. Commands are imported late,
so that `--help` does not load torch. Exit status: 0 done, 2 bad usage, configuration or data, 3 stopped by a
signal after saving, 1 anything else; rank 0 also writes it to RUN_DIR/exit.json, because `accelerate launch`
turns every failure into 1.
"""

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dpo import terminal
from dpo.cli.parse import nearest, parse
from dpo.cli.table import COMMANDS
from dpo.cli.tools import TOOLS, run_tool
from dpo.config import Config, SftConfig
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.tracking.exit_record import record_end

USAGE = """usage: dpo COMMAND --config FILE [--KEY VALUE ...]

Direct Preference Optimization with an offline reference cache.

commands:
{commands}
  plan             memory, time and disk of a run, before it is started
  frontier         several betas and the SFT baseline on one cache: score against KL
  compare RUN ...  runs side by side: settings, numbers, curves
  cache ACTION     info, verify or prune: look after the reference cache
  check [COMMAND]  validate a configuration and its data for COMMAND (default: train); loads no model

dpo COMMAND --help says more, and lists every key.
--quiet leaves warnings, errors and the summary; --json_lines makes standard output one JSON object a line.
Several processes: accelerate launch --config_file launch/cpu.yaml -m dpo ...
"""


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status."""
    commands = "\n".join(f"  {name:<16} {summary}" for name, summary in COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE.format(commands=commands))
        return 0 if arguments else 2
    command, *rest = arguments
    if command in TOOLS:
        return run_tool(command, rest)
    run_dir: Path | None = None
    started = time.time()
    rest = _choose_output(rest)
    try:
        only_check = command == "check"
        if only_check:
            command = rest.pop(0) if rest and not rest[0].startswith("-") else "train"
        if command not in COMMANDS:
            raise UserError(
                f"no command {command}{nearest(command, [*COMMANDS, *TOOLS, 'check'])}; see dpo --help"
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


def _execute(command: str, config: Config | SftConfig, *, only_check: bool) -> None:
    from dpo.commands import best_of, check, evaluate, precompute_ref, sft, train

    if only_check:
        check.check(command, config)
    elif isinstance(config, SftConfig):
        sft.sft(config)
    else:
        {
            "precompute-ref": precompute_ref.precompute_ref,
            "train": train.train,
            "evaluate": evaluate.evaluate,
            "best-of": best_of.best_of,
        }[command](config)


def _finish(run_dir: Path | None, command: str, status: int, message: str, started: float) -> int:
    """Leaves RUN_DIR/exit.json for scripts, from rank 0."""
    terminal.event("end", {"command": command, "status": status, "message": message})
    if run_dir is not None and os.environ.get("RANK", "0") == "0":
        record_end(run_dir, command, status, message, started)
    return status


def _say(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr, flush=True)
