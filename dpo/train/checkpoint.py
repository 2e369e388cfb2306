"""Checkpoints: written beside, flushed, digested, signed, renamed last. Others do not exist.

What a run needs to go on is listed in one place: the engine's state (weights, optimizer), `Progress`, and the
random state of every rank (the loop draws nothing, but a model may: a router's jitter, say). The order of the
data is a function of (seed, epoch), and a step's metrics are its own.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dpo import distributed
from dpo.engine.engine import ENGINE_TAG, Engine
from dpo.errors import UserError
from dpo.train.manifest import MANIFEST, FileDigests, Manifest, digest_of, read_manifest, sync, write_manifest

T = TypeVar("T")

PROGRESS = "progress.json"
CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done; with the plan it fixes epoch and position."""
    num_tokens: int = 0
    """Tokens trained on so far, without padding."""
    best_loss: float | None = None
    """Lowest held-out loss so far, in nats."""
    evaluated_step: int = -1
    """The last step whose evaluation is recorded."""
    skipped: int = 0
    """Steps whose update was skipped, because a number was not finite."""
    skipped_in_a_row: int = 0
    """How many of them were the last ones."""


def save_checkpoint(
    engine: Engine,
    progress: Progress,
    run_dir: Path,
    keep_last: int,
    fingerprints: dict[str, str],
    *,
    working: Callable[[str], None] = lambda doing: None,
) -> Path:
    """Writes checkpoints/step_00000100 (eight digits) and then removes old ones. All ranks must call it.

    Args:
        engine: Its weights and optimizer state.
        progress: Where the run stands.
        run_dir: The run folder, on storage that all ranks share.
        keep_last: How many complete checkpoints stay.
        fingerprints: Name -> digest of what the run was started on.
        working: Told of every part that is done.

    Raises:
        UserError: A rank could not write; the checkpoints that were there are still there.
    """
    final = run_dir / "checkpoints" / f"step_{progress.step:08d}"
    building = final.with_name(f".{final.name}.writing")
    working(f"writing {final.name}")
    _together(lambda: _prepare(building, progress), building)
    files: list[Path] = []
    failure: Exception | None = None
    try:
        files = [*engine.save(building), _save_random_state(building)]
    except CANNOT_WRITE as error:
        failure = error
    working(f"digesting {final.name}")

    def digest() -> FileDigests:
        if failure is not None:
            raise failure
        return {str(path.relative_to(building)): digest_of(sync(path)) for path in files}

    digests = {name: known for own in _together(digest, building) for name, known in own.items()}

    def publish() -> None:
        if not distributed.is_main():
            return
        others = (path for path in building.rglob("*") if path.is_file())
        more = {str(path.relative_to(building)): path for path in others}
        manifest = Manifest(
            step=progress.step,
            world_size=distributed.world_size(),
            engine=engine.kind,
            fingerprints=fingerprints,
            files=digests
            | {name: digest_of(sync(path)) for name, path in sorted(more.items()) if name not in digests},
        )
        write_manifest(manifest, building, run_dir)
        _rename_into_place(building, final)
        for abandoned in final.parent.glob(".step_*.writing"):  # by a process that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
        # A run that went on from an earlier checkpoint has given up those after it, and records them anew.
        given_up = [folder for folder in complete_checkpoints(run_dir) if folder.name > final.name]
        old = complete_checkpoints(run_dir)[: -keep_last - len(given_up)]
        for folder in (*given_up, *old):
            shutil.rmtree(folder)

    _together(publish, building)
    return final


def load_checkpoint(engine: Engine, folder: Path, state: Path) -> Progress:
    """Restores engine, random state and progress of a checkpoint that has been verified. All ranks must call
    it.

    Args:
        engine: Of the kind that wrote it.
        folder: The checkpoint.
        state: The folder to load the engine from: the checkpoint, or its universal form for this world size.
    """
    engine.load(state)
    own = _random_state_file(folder)
    if own.is_file() and read_manifest(folder).world_size == distributed.world_size():
        for name, value in load_file(own).items():
            torch.set_rng_state(value) if name == "cpu" else torch.cuda.set_rng_state(value)
    return Progress(**json.loads((folder / PROGRESS).read_text()))


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first; one that was being replaced when the run died counts."""
    found = {path.parent for path in (run_dir / "checkpoints").glob(f"step_*/{MANIFEST}")}
    for aside in (run_dir / "checkpoints").glob(f".step_*.replaced/{MANIFEST}"):
        if aside.parent.with_name(aside.parent.name[1:].removesuffix(".replaced")) not in found:
            found.add(aside.parent)
    return sorted(found, key=lambda folder: folder.name.lstrip("."))


def _prepare(building: Path, progress: Progress) -> None:
    if distributed.is_main():
        shutil.rmtree(building, ignore_errors=True)
        (building / ENGINE_TAG).mkdir(parents=True)
        (building / "rng").mkdir()
        (building / PROGRESS).write_text(json.dumps(asdict(progress)))


def _rename_into_place(building: Path, final: Path) -> None:
    aside = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if final.exists():
        final.rename(aside)
    building.rename(final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _random_state_file(folder: Path) -> Path:
    return folder / "rng" / f"rank_{distributed.rank():05d}.safetensors"


def _save_random_state(folder: Path) -> Path:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    save_file(states, _random_state_file(folder))
    return _random_state_file(folder)


def _together(work: Callable[[], T], building: Path) -> list[T]:
    """Every rank's result; UserError on all of them if one could not write, after what it wrote is gone."""
    result: T | None = None
    problem: str | None = None
    try:
        result = work()
    except CANNOT_WRITE as error:
        problem = " ".join(str(error).split())
    outcomes = distributed.gather_objects((result, problem))
    failed = {rank: said for rank, (_, said) in enumerate(outcomes) if said}
    if failed:
        free = shutil.disk_usage(building.parent if building.parent.is_dir() else building.parents[1]).free
        if distributed.is_main():
            shutil.rmtree(building, ignore_errors=True)
        distributed.barrier()
        rank, said = next(iter(failed.items()))
        raise UserError(
            f"{building.parent}: a checkpoint could not be written (rank {rank}: {said}; "
            f"{free / 1e6:,.1f} MB are free there). The checkpoints before it are valid: make room, and the "
            "same command goes on from the newest"
        )
    return [result for result, _ in outcomes if result is not None]
