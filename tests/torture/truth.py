"""What must hold after an attempt, whatever happened to it, and after the undisturbed one at the end."""

import re
from pathlib import Path

import numpy as np
from rig import checkpoints, metrics, weights

from dpo.reference.store import ReferenceStore
from dpo.train.manifest import MANIFEST
from torture.plan import Seed
from torture.world import Attempt

ERRORS_OF_A_DISK = {"ENOSPC", "EIO", "ESTALE"}
ALLOWED: dict[str, set[int | None]] = {  # a fault -> statuses in exit.json besides 0; None: no record
    "kill of a process": {1, 3, None},  # 3: the launcher was killed, and the ranks save
    "kill in a call": {1, None},
    "signal": {1, 3, None},  # 1: a rank that had not joined yet is ended by it, and is named
    "stop and go": set(),
    "stop for ever": {1, None},
    "ENOSPC": {2, None},
    "EIO": {2, None},
    "ESTALE": {2, None},
    "short writes": set(),
    "slow renames": set(),
    "clock jump": set(),
    "second launch": set(),
}
WHY_1 = re.compile(
    r"rank \d+ \(.*\) is gone|rank 0, which holds the store|no progress for|interrupted|rank \d+: .*"
)
CHECKPOINT = re.compile(r"a checkpoint of step (\d+) is in")
AUDIT = 1e-4
"""Nats by which the values of a resumed build may differ: its batches are others."""
FOREIGN = re.compile(r"\.writing$|\.replaced$|\.universal$|^tmp|^lock\.json$|\.lock$|^\.none_yet$")


def wrong_after_attempt(attempt: Attempt, run_dir: Path, seed: Seed) -> list[str]:
    """What does not hold after a disturbed attempt."""
    happened = {fault.kind for fault in attempt.faults}
    found = [f"hangs, or left behind: {process}" for process in attempt.hanging]
    if attempt.second is not None:
        found += [f"the second launch hangs: {process}" for process in attempt.second.hanging]
        if is_refused(attempt) or attempt.record == {}:  # the second one has the folder, or wrote last
            return found + _wrong_of_second(attempt)
        found += _wrong_of_second(attempt.second)
        if attempt.record["started"] >= attempt.second_at:  # both ran, and the second one wrote last
            return found + ([] if attempt.record["status"] == 0 else [f"exit.json: {attempt.record}"])
    status: int | None = attempt.record.get("status")
    message = str(attempt.record.get("message", ""))
    allowed = {0}.union(*(ALLOWED[kind] for kind in happened))
    if status not in allowed:
        found.append(f"status {status} in exit.json, expected one of {allowed}: {message}")
    if status == 0 and any(number != 0 for number in attempt.statuses) and not happened & KILLERS:
        found.append(f"exit.json says 0, the processes {attempt.statuses}")
    if status == 0 and seed.stage == "train" and not (run_dir / "model" / "model.safetensors").is_file():
        found.append("exit.json says 0, and there is no model")
    if status in (2, 3) and "Traceback" in _of_ranks(attempt.output):
        found.append(f"status {status} with a traceback")
    if status == 1 and not WHY_1.search(message):
        found.append(f"status 1 with a reason that is none: {message}")
    if (
        status == 2
        and happened & ERRORS_OF_A_DISK
        and not re.search(r"space|[Ii]nput/output|[Ss]tale|the disk did not take all bytes", message)
    ):
        found.append(f"status 2, and the disk's error is not named: {message}")
    if (said := CHECKPOINT.search(message)) and not (
        run_dir / "checkpoints" / f"step_{int(said[1]):08d}" / MANIFEST
    ).is_file():
        found.append(f"there is no such checkpoint: {message}")
    return found


KILLERS = {"kill of a process", "kill in a call", "signal", "stop for ever"}


def is_refused(attempt: Attempt) -> bool:
    """Whether another process had the folder."""
    return {*attempt.statuses} == {2} and "is in use by process" in attempt.output


def _wrong_of_second(second: Attempt) -> list[str]:
    if is_refused(second) or {*second.statuses} == {0}:
        return []
    return [f"one of two launches ended with {second.statuses}: {second.output[-1500:]}"]


def _of_ranks(output: str) -> str:
    """What the launcher prints of its own after a failure is not ours."""
    return output if "torch.distributed.elastic" not in output else ""


def stopped_at(attempt: Attempt) -> set[str]:
    """Names of the checkpoints that an attempt says it has stopped with."""
    return {f"step_{int(step):08d}" for step in CHECKPOINT.findall(attempt.output)}


def wrong_at_the_end(
    attempt: Attempt, folder: Path, undisturbed: Path, seed: Seed, stops: set[str]
) -> list[str]:
    """What differs from an undisturbed run after an attempt that nothing disturbed.

    Args:
        attempt: The last one.
        folder: Everything that the run has written.
        undisturbed: Of the run that nothing disturbed.
        seed: What happened.
        stops: Checkpoints at which earlier attempts stopped: they may be there besides.
    """
    if {*attempt.statuses} != {0}:
        return [f"the undisturbed attempt ended with {attempt.statuses}: {attempt.output[-3000:]}"]
    found = [] if attempt.record.get("status") == 0 else [f"exit.json: {attempt.record}"]
    run, whole = folder / "run", undisturbed / "run"
    if seed.stage == "train":
        found += _other_training(run, whole, stops, exact=seed.last_ranks == seed.ranks)
    elif seed.stage == "precompute-ref":
        found += _other_values(folder / "reference", undisturbed / "reference")
    else:
        for name in ("summary.json", "samples.jsonl"):
            if (run / "report" / name).read_bytes() != (whole / "report" / name).read_bytes():
                found.append(f"report/{name} differs")
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if FOREIGN.search(path.name)}
    return found + [f"left behind: {name}" for name in sorted(left)]


def _other_training(run: Path, whole: Path, stops: set[str], *, exact: bool) -> list[str]:
    ours, theirs = metrics(run), metrics(whole)
    if exact:
        regular, there = {*checkpoints(whole)}, {*checkpoints(run)}
        same = {
            "metrics.jsonl": ours == theirs,
            "model": weights(run) == weights(whole),
            "checkpoints": regular <= there <= regular | stops,
        }
    else:
        losses = [[line.get("train/loss", 0.0) for line in lines] for lines in (ours, theirs)]
        same = {"losses": len(ours) == len(theirs) and bool(np.allclose(*losses, rtol=1e-3))}
    return [f"{name} differ(s)" for name, equal in same.items() if not equal]


def _other_values(cache: Path, whole: Path) -> list[str]:
    ours, theirs = (
        ReferenceStore.at(next(path.parent for path in root.glob("*/identity.json"))).load()
        for root in (cache, whole)
    )
    places = ours.index.find(theirs.index.keys)
    if len(ours) != len(theirs) or (places < 0).any():
        return [f"the cache has {len(ours)} of {len(theirs)} sequences"]
    if not np.allclose(ours.logps[places], theirs.logps, rtol=0, atol=AUDIT):
        return ["the cache's values differ"]
    return []
