"""What a seed does to a run: a function of the seed alone."""

import errno
import random
import signal
from dataclasses import dataclass, field

STAGES = ("precompute-ref", "train", "train", "evaluate")
ENGINES: tuple[int | None, ...] = (None, None, 2)
"""ZeRO stage; None: DDP."""
STUCK_AFTER = 8.0
"""Seconds, in all runs."""
FOR_EVER = 10_000
FAIL, SHORTEN, DELAY, KILL, STOP, JUMP = range(1, 7)
RENAMES, OTHERS = 1, 2
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class Call:
    """A fault under the n-th call with which a rank changes a file: the arguments of `torture_arm`."""

    action: int
    kinds: int = RENAMES | OTHERS
    nth: int
    how_often: int = 1
    value: int = 0


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that happens to a run."""

    kind: str
    rank: int = 0
    call: Call | None = None
    """In a rank's call; None: from outside."""
    at: float = 0.0
    """When, from outside: share of the time that an undisturbed run takes."""
    whom: float = 0.0
    """Which process of the tree, from outside: 0 is the first, 1 the last."""
    number: int = 0
    """Signal."""
    pause: float | None = None
    """Seconds until a stopped process goes on; None: never."""


@dataclass(frozen=True, kw_only=True)
class Seed:
    """Everything that happens to one run before it is left in peace."""

    number: int
    stage: str
    engine: int | None
    launcher: bool
    """Through launch/run, accelerate and torchelastic, or forked."""
    own_data: bool
    """Whether the run tokenizes its data itself."""
    attempts: list[list[Fault]] = field(default_factory=list)
    ranks: int = 2
    last_ranks: int = 2
    """Of the last, undisturbed attempt."""


def plan(number: int, *, launcher: bool | None = None, ranks: int = 2) -> Seed:
    """What this seed does.

    Args:
        number: The seed.
        launcher: Whether to start through launch/run; None: one in five.
        ranks: 1 or 2; a single one is never started through launch/run.
    """
    dice = random.Random(number)
    stage = dice.choice(STAGES)
    launched = dice.random() < 0.2
    launched = (launched if launcher is None else launcher) and ranks == 2
    engine = 2 if launched else dice.choice(ENGINES)
    attempts = [[_fault(dice, launched, ranks)] for _ in range(dice.choice((1, 1, 2, 3)))]
    if dice.random() < 0.2:
        attempts[0].append(_fault(dice, launched, ranks))
    other = stage == "train" and not launched and ranks == 2 and dice.random() < 0.15
    return Seed(
        number=number,
        stage=stage,
        engine=engine,
        launcher=launched,
        own_data=stage == "precompute-ref" or dice.random() < 0.3,
        attempts=attempts,
        ranks=ranks,
        last_ranks=1 if other else ranks,
    )


def _fault(dice: random.Random, launched: bool, ranks: int) -> Fault:
    rank, nth = dice.randrange(2) % ranks, round(10 ** dice.uniform(0, 2.5))

    def call(action: int, **more: int) -> Call:
        return Call(action=action, nth=nth, **more)

    def error(number: int) -> Call:
        return call(FAIL, value=number, how_often=dice.choice((1, FOR_EVER)))

    at, whom = dice.uniform(0, 1.1), dice.random()
    kinds: dict[str, Fault] = {
        "kill of a process": Fault(kind="kill of a process", at=at, whom=whom),
        "kill in a call": Fault(kind="kill in a call", rank=rank, call=call(KILL)),
        "signal": Fault(kind="signal", at=at, whom=whom, number=dice.choice(SIGNALS)),
        "stop and go": Fault(kind="stop and go", at=at, whom=whom, pause=dice.uniform(0.5, 4)),
        "stop for ever": Fault(kind="stop for ever", rank=rank, call=call(STOP)),
        "ENOSPC": Fault(kind="ENOSPC", rank=rank, call=error(errno.ENOSPC)),
        "EIO": Fault(kind="EIO", rank=rank, call=error(errno.EIO)),
        "ESTALE": Fault(kind="ESTALE", rank=rank, call=error(errno.ESTALE)),
        "short writes": Fault(kind="short writes", rank=rank, call=call(SHORTEN, how_often=FOR_EVER)),
        "slow renames": Fault(
            kind="slow renames",
            rank=rank,
            call=Call(action=DELAY, kinds=RENAMES, nth=1, how_often=9, value=400),
        ),
        "clock jump": Fault(
            kind="clock jump", rank=rank, call=call(JUMP, value=dice.choice((-9000, -5, 5, 9000)))
        ),
        "second launch": Fault(kind="second launch", at=at),
    }
    if launched:
        del kinds["stop for ever"]  # the launcher's patience would be tested, and takes minutes
    return kinds[dice.choice([*kinds, "kill of a process", "kill in a call"])]
