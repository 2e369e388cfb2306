"""A server that lives as long as a sampling needs it: started with the policy, waited for, and ended.

So each round of `dpo rounds` samples its own policy, and the memory of the GPUs is free for training again.
It ends with this process, however that ends.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

from dpo import alive, terminal
from dpo.errors import UserError
from dpo.evaluate.server import Server, models_of

MODEL = "{model}"
LONGEST_START = 1800.0
"""Seconds in which a server must answer; loading a large model takes minutes."""
POLL = 1.0
GRACE = 30.0
"""Seconds between SIGTERM and SIGKILL."""
ENDS_WITH_PARENT = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
try:
    os.execvp(sys.argv[1], sys.argv[1:])
except OSError as error:
    sys.exit(f"{sys.argv[1]}: {error.strerror}")
"""
"""A program that becomes the server, and that the kernel ends with its parent (Linux)."""


@contextmanager
def served(command: str | None, model: str, server: Server) -> Iterator[None]:
    """The server while the block runs; without a command nothing, for a server that runs already.

    Args:
        command: As in a shell, without its operators; `{model}` stands for the policy.
        model: The policy.
        server: Where it will answer.

    Raises:
        UserError: Something answers there already, or the server ends or does not answer in time.
    """
    if command is None:
        yield
        return
    once = replace(server, tries=1, timeout=10.0)
    if _answers(once):
        raise UserError(
            f"--serve: something answers at {server.url} already, and would be asked in place of the server "
            "that is started: end it, or give another port in --serve and --endpoint"
        )
    words = [word.replace(MODEL, model) for word in shlex.split(command)]
    terminal.note(f"--serve: {shlex.join(words)}")
    process = subprocess.Popen([sys.executable, "-c", ENDS_WITH_PARENT, *words], start_new_session=True)
    try:
        began = time.monotonic()
        while not _answers(once):
            alive.loading("the server of --serve")
            if (status := process.poll()) is not None:
                raise UserError(
                    f"--serve: the server ended with status {status} before it answered; see above"
                )
            if time.monotonic() - began > LONGEST_START:
                minutes = LONGEST_START / 60
                raise UserError(f"--serve: no answer at {server.url} in {minutes:.0f} minutes; is it there?")
            time.sleep(POLL)
        yield
    finally:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with suppress(ProcessLookupError):  # workers that it left
            os.killpg(process.pid, signal.SIGKILL)


def _answers(server: Server) -> bool:
    try:
        server.get("models", models_of)
    except UserError:
        return False
    return True
