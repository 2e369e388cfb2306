"""Signs of life of this process, for the watchdog (`dpo.guards.watchdog`), which ends a run that hangs.

Every loop of ours that may take long says `advanced` for each piece of its work; `terminal.progress` and
`terminal.bar` do so by themselves. Loops that all ranks run together, such as training's, say `step`.
Libraries that load or download say nothing: meanwhile the watchdog looks at the process's CPU time and bytes.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True, kw_only=True)
class Life:
    """What this process does, and when it last got on."""

    doing: str = "starting"
    """For people, such as `step 7`."""
    steps: int = 0
    """Stages, steps, micro-batches and files so far; ranks that work together have the same."""
    advanced_at: float = field(default_factory=time.monotonic)
    """Monotonic seconds of the last sign of life."""
    loading: bool = True
    """Whether CPU time and bytes of the process count as signs of life."""
    waits: int = 0
    """Nested waits for other ranks."""


life = Life()
"""Of this process."""


def advanced() -> None:
    """Notes that a piece of work is done. Costs nothing: call it for each row, file, chunk or batch."""
    life.advanced_at = time.monotonic()


def step(doing: str) -> None:
    """Notes that this rank does the next piece of work that all ranks do.

    Args:
        doing: What comes now, such as `step 7`.
    """
    life.doing, life.steps, life.loading = doing, life.steps + 1, False
    advanced()


def loading(doing: str) -> None:
    """Notes that code comes that may say nothing for long; it ends with the next `step`.

    Args:
        doing: What comes now, such as `loading the policy`.
    """
    life.doing, life.steps, life.loading = doing, life.steps + 1, True
    advanced()


@contextmanager
def waiting() -> Iterator[None]:
    """Within the block this rank waits for others: it does not hang as long as one of them gets on."""
    life.waits += 1
    try:
        yield
    finally:
        life.waits -= 1
        advanced()
