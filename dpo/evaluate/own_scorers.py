"""Scorers that users bring: a Python function, or a program that reads and writes JSON lines."""

import json
import math
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any

from dpo.config.own import find_function
from dpo.errors import UserError
from dpo.evaluate.asked import Asked


class FunctionScorer:
    """A Python function of the prompts and their completions; positive above 0.

    Args:
        path: module.function, importable from the current folder or installed. It takes two lists of P texts,
            prompts and completions, and returns P finite numbers, higher is better.

    Raises:
        UserError: There is no such module or function.
    """

    def __init__(self, path: str) -> None:
        self.name = f"python:{path}"
        self.identity: str | None = None
        self._function = find_function(path, f"scorer {self.name}")

    def score(self, prompts: Sequence[Asked], completions: Sequence[str]) -> list[float]:
        """What the function returns for these texts."""
        return _numbers(
            self._function([prompt.text for prompt in prompts], [*completions]), len(completions), self.name
        )

    def is_positive(self, score: float) -> bool:
        """Whether the score exceeds 0."""
        return score > 0


class CommandScorer:
    """A program that reads a line {"prompt": ..., "completion": ...} for each text and prints a number each.

    It is started once for a batch; positive above 0.

    Args:
        command: The program and its arguments, as in a shell, without its operators.

    Raises:
        UserError: There is no such program.
    """

    def __init__(self, command: str) -> None:
        self.name = f"command:{command}"
        self.identity: str | None = None
        try:
            self._command = shlex.split(command)
        except ValueError as error:
            raise UserError(f"scorer {self.name}: {error}; expected a program and its arguments") from error
        if not self._command or shutil.which(self._command[0]) is None:
            raise UserError(
                f"scorer {self.name}: no such program, or not executable; expected one and its arguments"
            )

    def score(self, prompts: Sequence[Asked], completions: Sequence[str]) -> list[float]:
        """The numbers that the program prints.

        Raises:
            UserError: It cannot be started, fails, or prints something else.
        """
        pairs = zip(prompts, completions, strict=True)
        lines = [json.dumps({"prompt": prompt.text, "completion": text}) for prompt, text in pairs]
        try:
            done = subprocess.run(
                self._command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise UserError(
                f"scorer {self.name}: cannot be started: {error.strerror}; expected a program"
            ) from error
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["it printed no error"])[-1]
            raise UserError(f"scorer {self.name}: failed with status {done.returncode}: {last}")
        try:
            printed = [float(line) for line in done.stdout.split()]
        except ValueError as error:
            raise UserError(
                f"scorer {self.name}: {error}; expected one number a line on standard output, nothing else"
            ) from error
        return _numbers(printed, len(completions), self.name)

    def is_positive(self, score: float) -> bool:
        """Whether the score exceeds 0."""
        return score > 0


def _numbers(scores: Any, expected: int, name: str) -> list[float]:
    """Scores as Python numbers. Raises UserError unless there is a finite one for each text."""
    try:
        numbers = [float(score) for score in scores]
    except (TypeError, ValueError) as error:
        raise UserError(f"scorer {name}: {error}; expected {expected} numbers") from error
    if len(numbers) != expected or not all(map(math.isfinite, numbers)):
        kind = "scores" if len(numbers) != expected else "scores, some of them not finite,"
        raise UserError(
            f"scorer {name}: {len(numbers)} {kind} for {expected} texts; expected a finite one for each"
        )
    return numbers
