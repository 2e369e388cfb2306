"""`make torture`: random faults against random stages, and what must hold afterwards.

    python -m torture                        seeds from 0 on, until --minutes have passed
    python -m torture --seed 17              replays one
    python -m torture --seeds 3,17,40        replays a few
    python -m torture --first 200 --minutes 60

Prints a line for each seed and a summary; --summary FILE adds the counts to those of a file. Status 1 if
anything did not hold. What a seed does is a function of its number; a fault from outside comes at a share of
the time that an undisturbed run takes, so that a replay on a machine of another speed may differ.
"""

import argparse
import collections
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from rig import Rig, make_rig
from tiny import make_tiny_model

from torture.plan import Fault, Seed, plan
from torture.truth import stopped_at, wrong_after_attempt, wrong_at_the_end
from torture.world import World, compile_library, is_loaded


class Torture:
    """The seeds of one call, and what is compared with."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rig: Rig = make_rig(folder / "rig", make_tiny_model(folder / "tiny_model"))
        self._undisturbed: dict[tuple[str, int | None, bool], tuple[Path, float]] = {}
        self.counts: collections.Counter[str] = collections.Counter()
        """Faults that happened, by kind."""

    def run(self, seed: Seed) -> list[str]:
        """What did not hold for this seed."""
        undisturbed, duration = self._baseline(seed)
        world = self._world(f"seed_{seed.number}", seed, undisturbed)
        found: list[str] = []
        stops: set[str] = set()
        for faults in seed.attempts:
            attempt = world.attempt(faults, duration)
            self.counts.update(fault.kind for fault in attempt.faults)
            stops |= stopped_at(attempt)
            wrong = wrong_after_attempt(attempt, world.run_dir, seed)
            found += [f"{line} (attempt of {attempt.seconds:.0f} s: {attempt.statuses})" for line in wrong]
        if seed.last_ranks != seed.ranks:
            self.counts["other world size"] += 1
        last = world.attempt([], duration, last=True)
        found += wrong_at_the_end(last, world.folder, undisturbed, seed, stops)
        if found:
            found.append(f"everything is in {world.folder}, the output of each attempt beside its run")
        else:
            shutil.rmtree(world.folder)
        return found

    def _baseline(self, seed: Seed) -> tuple[Path, float]:
        """An undisturbed run, and its seconds. Started twice: the second one is not the first to import."""
        kind = (seed.stage, seed.engine, seed.launcher)
        if kind not in self._undisturbed:
            calm = replace(seed, number=-1, own_data=True, attempts=[], last_ranks=seed.ranks)
            trained = self._baseline(replace(seed, stage="train"))[0] if seed.stage == "evaluate" else None
            for name in ("first", "second"):
                world = self._world(f"{'_'.join(map(str, kind))}_{name}", calm, trained)
                ended = world.attempt([], None)
                assert {*ended.statuses} == {0}, (ended.statuses, ended.hanging, ended.output[-4000:])
            self._undisturbed[kind] = (world.folder, ended.seconds)
        return self._undisturbed[kind]

    def _world(self, name: str, seed: Seed, undisturbed: Path | None) -> World:
        folder = self._folder / name
        folder.mkdir()
        if seed.stage == "evaluate" and undisturbed is not None:
            shutil.copytree(undisturbed / "run", folder / "run", ignore=shutil.ignore_patterns("report"))
        return World(rig=self._rig, seed=seed, folder=folder)


def described(seed: Seed) -> str:
    """A seed for people."""
    engine = "DDP" if seed.engine is None else f"ZeRO-{seed.engine}"
    way = "launch/run" if seed.launcher else "forked"
    attempts = "; ".join(" and ".join(map(_described, faults)) for faults in seed.attempts)
    return f"{seed.stage}, {engine}, {way}: {attempts}"


def _described(fault: Fault) -> str:
    if fault.call is not None:
        return f"{fault.kind} of rank {fault.rank} (call {fault.call.nth})"
    return f"{fault.kind} (at {fault.at:.2f})"


def main() -> int:
    """Runs the seeds; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m torture", description=__doc__)
    parser.add_argument("--seed", "--seeds", default="", help="replay these, separated by commas")
    parser.add_argument("--first", type=int, default=0, help="first of the seeds that are tried")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--forked", action="store_true", help="never start through launch/run")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=2)
    parser.add_argument("--folder", type=Path, help="kept; default: a temporary folder")
    parser.add_argument("--temporary", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--summary", type=Path, help="JSON file that the counts are added to")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="torture_"))
    folder.mkdir(parents=True, exist_ok=True)
    if not is_loaded():  # again, with the library under every process from its first instruction on
        preloaded = {**os.environ, "LD_PRELOAD": str(compile_library(folder)), "OMP_NUM_THREADS": "1"}
        arguments = [sys.executable, "-m", "torture", *sys.argv[1:]]
        if options.folder is None:
            arguments += ["--folder", str(folder), "--temporary"]
        os.execve(sys.executable, arguments, preloaded)
    numbers = [int(number) for number in options.seed.split(",") if number]
    until = time.monotonic() + 60 * options.minutes
    torture, failed, done = Torture(folder), dict[int, list[str]](), 0
    number = options.first
    while numbers or (not options.seed and time.monotonic() < until):
        number = numbers.pop(0) if numbers else number
        began = time.monotonic()
        seed = plan(number, launcher=False if options.forked else None, ranks=options.ranks)
        wrong = torture.run(seed)
        done += 1
        took = time.monotonic() - began
        print(f"seed {number}: {'WRONG' if wrong else 'holds'}, {took:.0f} s: {described(seed)}", flush=True)
        for line in wrong:
            print(f"    {line}", flush=True)
        if wrong:
            failed[number] = wrong
        number += 1
    _sum_up(torture, failed, done, options.summary)
    if not failed and options.temporary:
        shutil.rmtree(folder, ignore_errors=True)
    return 1 if failed else 0


def _sum_up(torture: Torture, failed: dict[int, list[str]], done: int, file: Path | None) -> None:
    counts = collections.Counter({"seeds": done, "seeds that failed": len(failed), **torture.counts})
    if file is not None:
        if file.is_file():
            counts.update(json.loads(file.read_text()))
        file.write_text(json.dumps(counts, indent=1) + "\n")
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))
    if failed:
        print(f"replay: make torture ARGS='--seeds {','.join(map(str, failed))}'")


if __name__ == "__main__":
    sys.exit(main())
