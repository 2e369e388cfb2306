"""The command line: configuration in, exit status out.

Commands are imported late, so that `--help` does not load torch. Exit status: 0 done; 2 bad usage,
configuration or data; 3 stopped by a signal after saving; 1 anything else. Rank 0 also writes it to
RUN_DIR/exit.json, because `accelerate launch` turns every failure into 1.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpo import terminal
from dpo.cli.help import fitted
from dpo.cli.parse import parse
from dpo.cli.table import COMMANDS, CONFIGURED, TOOLS
from dpo.cli.tools import run_tool
from dpo.config import Config, SftConfig
from dpo.config.foreign import nearest
from dpo.errors import RunFailed, RunInUse, StoppedBySignal, UserError
from dpo.interrupts import keyboard
from dpo.processes import collect_from_here
from dpo.tracking.exit_record import record_end
from dpo.tracking.run_folder import RunFolder

USAGE = """usage: dpo COMMAND --config FILE [--KEY VALUE ...]

Direct Preference Optimization with an offline reference cache.

commands:

{commands}

dpo COMMAND --help says more, and lists every key. --quiet leaves warnings, errors, what was asked for and the
summary; --json_lines makes standard output one JSON object per line.

Several processes: accelerate launch --config_file launch/cpu.yaml -m dpo ...
"""


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        commands = "\n".join(f"  {name:<16} {summary}" for name, summary in COMMANDS.items())
        print(fitted(USAGE.format(commands=commands)))
        return 0 if arguments else 2
    command, *rest = arguments
    rest = _choose_output(rest)
    if command in TOOLS:
        collect_from_here()
        return _ended(lambda: run_tool(command, rest), lambda status, said: _end(command, status, said))
    folder: RunFolder | None = None
    started, in_use = time.time(), False

    def work() -> int:
        nonlocal command, folder, in_use
        if any(word.partition("=")[0] in ("--local_rank", "--local-rank") for word in rest):
            raise UserError(
                "--local_rank: an argument of the deepspeed launcher; start with accelerate launch"
            )
        only_check, exact = command == "check", False
        if only_check:
            exact = "--exact" in rest
            rest[:] = [word for word in rest if word != "--exact"]
            command = rest.pop(0) if rest and not rest[0].startswith("-") else "train"
        if command not in CONFIGURED:
            raise UserError(f"no command {command}{nearest(command, [*COMMANDS])}; see dpo --help")
        config = parse(command, rest)
        folder = None if only_check else RunFolder(Path(config.run_dir))
        try:
            _execute(command, config, only_check=only_check, exact=exact)
        except RunInUse:
            in_use = True
            raise
        return 0

    def record(status: int, message: str) -> None:
        _end(command, status, message)
        if folder is not None and os.environ.get("RANK", "0") == "0":
            record_end(folder, command, status, message, started, in_use=in_use)

    return _ended(work, record)


def _end(command: str, status: int, message: str) -> None:
    terminal.event("end", {"command": command, "status": status, "message": message})


def _ended(work: Callable[[], int], record: Callable[[int, str], None] = lambda status, message: None) -> int:
    """The exit status of a command, after its error was printed and its end recorded.

    Args:
        work: The command; returns 0, or 2 after bad usage.
        record: Told of the status and its reason.
    """
    try:
        with keyboard():
            status = work()
        message = "done"
    except UserError as error:
        status, message = 2, str(error)
        _say(f"dpo: error: {error}")
    except StoppedBySignal as stopped:
        status, message = 3, str(stopped)
        if os.environ.get("RANK", "0") == "0":  # all ranks stop together
            _say(f"dpo: stopped by a signal: {stopped}")
    except RunFailed as failed:
        status, message = 1, str(failed)
        _say(f"dpo: failed: {failed}")
    except KeyboardInterrupt:
        status, message = 1, "interrupted"
        _say("dpo: interrupted")
    except Exception as error:
        record(1, f"{type(error).__name__}: {error}")
        raise
    record(status, message)
    return status


def _choose_output(arguments: Sequence[str]) -> list[str]:
    """Takes --quiet and --json_lines out of the arguments; the last one counts, also for child processes."""
    for flag in arguments:
        if flag in terminal.FLAGS:
            os.environ[terminal.OUTPUT] = terminal.FLAGS[flag]
    return [argument for argument in arguments if argument not in terminal.FLAGS]


def _execute(command: str, config: Config | SftConfig, *, only_check: bool, exact: bool) -> None:
    """Imports only the command that is run: all of them take every rank a second more."""
    if only_check:
        from dpo.commands.check import check

        collect_from_here()
        check(command, config, exact=exact)
        return
    stage: Callable[[Any], object]
    if isinstance(config, SftConfig):
        from dpo.commands.sft import sft as stage
    elif command == "precompute-ref":
        from dpo.commands.precompute_ref import precompute_ref as stage
    elif command == "train":
        from dpo.commands.train import train as stage
    elif command == "evaluate":
        from dpo.commands.evaluate import evaluate as stage
    else:
        from dpo.commands.best_of import best_of as stage
    collect_from_here()
    stage(config)


def _say(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    print(message if rank == "0" else f"[rank {rank}] {message}", file=sys.stderr, flush=True)
