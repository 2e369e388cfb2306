"""Checkpoints: written beside their place, flushed, digested, signed, and renamed last.

What a run needs to resume is listed in one place: the engine's state (weights, optimizer), `Progress`, and
the random state of every rank (the loop draws nothing, but a model may). The order of the data is a function
of (seed, epoch).
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from dpo import alive, distributed
from dpo.engine.engine import Engine
from dpo.engine.sharded_state import ENGINE_TAG
from dpo.errors import UserError
from dpo.files import REPLACED, WRITING, publish_folder, sync, temporary_of, write_file
from dpo.tracking.run_folder import RunFolder
from dpo.train.manifest import (
    FileDigests,
    Manifest,
    complete_checkpoints,
    digest_of,
    make_key,
    read_manifest,
    write_manifest,
)
from dpo.train.pending import PendingCheckpoint

T = TypeVar("T")

PROGRESS = "progress.json"
ASIDE = "aside_"
CANNOT_WRITE = (OSError, RuntimeError, SafetensorError)
TORCHS_WRITER = re.compile("iostream error|inline_container|PytorchStreamWriter")
"""Errors of torch.save whose reason is lost."""


@dataclass(slots=True, kw_only=True)
class Progress:
    """How far a run is."""

    step: int = 0
    """Optimizer steps done; with the plan it fixes epoch and position."""
    num_tokens: int = 0
    """Tokens trained on so far, without padding."""
    best_loss: float | None = None
    """Lowest held-out loss so far, in nats."""
    best_step: int = -1
    """The step of `best_loss`, if the best weights are kept."""
    evaluated_step: int = -1
    """The last step whose evaluation is recorded."""
    skipped: int = 0
    """Steps whose update was skipped, because a number was not finite."""
    skipped_in_a_row: int = 0
    """How many of the last steps were skipped."""
    loss_sums: dict[str, float] = field(default_factory=dict)
    """The loss's named sums over all steps so far, which the next step's loss may read; see `Objective`."""
    reference_step: int = 0
    """The step whose policy is the reference, where that moves; 0: the reference of the start."""
    reference: str = ""
    """Its identity; empty for the reference of the start."""
    reference_rows: str = ""
    """Digest of the values that the run has of it."""


def prepare_checkpoints(folder: RunFolder, resumed: bool) -> None:
    """Makes, before the first step, what the first checkpoint needs and what shows that there was none.

    A run that is killed while it writes its first checkpoint can then be told from one that has lost it.

    Args:
        folder: The run folder. One process writes.
        resumed: Whether the run resumes from a checkpoint, of this run or another.

    Raises:
        OSError: The folder cannot be written to.
    """
    make_key(folder)
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    if resumed:
        folder.no_checkpoint_yet.unlink(missing_ok=True)
    else:
        write_file(folder.no_checkpoint_yet, "")


def save_checkpoint(
    engine: Engine, progress: Progress, folder: RunFolder, keep_last: int, fingerprints: dict[str, str]
) -> Path:
    """`begin_checkpoint`, waited for; returns the checkpoint. All ranks must call it."""
    return begin_checkpoint(engine, progress, folder, keep_last, fingerprints).finish()


def begin_checkpoint(
    engine: Engine,
    progress: Progress,
    folder: RunFolder,
    keep_last: int,
    fingerprints: dict[str, str],
    *,
    in_background: bool = False,
) -> PendingCheckpoint:
    """Takes a snapshot for checkpoints/step_00000100 (eight digits). All ranks must call it.

    It is a checkpoint when it is finished; then old ones are removed.

    Args:
        engine: Its weights and optimizer state.
        progress: How far the run is.
        folder: The run folder, on storage that all ranks share.
        keep_last: How many complete checkpoints are kept.
        fingerprints: Name -> digest of what the run was started on.
        in_background: Whether training goes on while it is written: then the state is copied.

    Raises:
        UserError: A rank could not write; the checkpoints before it are still there.
    """
    final = folder.checkpoint(progress.step)
    building = final.with_name(f".{final.name}{WRITING}")  # the same on all ranks
    alive.step(f"writing {final.name}")
    _on_all_ranks(lambda: _prepare(building, progress), building)
    write = engine.save(building, copied=in_background)
    states = _random_states()

    def write_own() -> FileDigests:
        files = [*write(), _write_random_states(states, building)]
        return {str(path.relative_to(building)): digest_of(sync(path)) for path in files}

    def finish(own: Callable[[], FileDigests]) -> tuple[Path, list[Path]]:
        alive.step(f"finishing {final.name}")
        parts = _on_all_ranks(own, building)
        manifest = Manifest(
            step=int(final.name.removeprefix("step_")),
            world_size=distributed.world_size(),
            engine=engine.kind,
            fingerprints=fingerprints,
            files={name: known for part in parts for name, known in part.items()},
        )
        obsolete = _on_all_ranks(lambda: _publish(manifest, building, final, folder, keep_last), building)
        return final, obsolete[distributed.rank()]

    return PendingCheckpoint(write_own, finish, in_background=in_background)


def load_checkpoint(engine: Engine, checkpoint: Path, state: Path) -> Progress:
    """Restores engine, random state and progress of a verified checkpoint. All ranks must call it.

    Args:
        engine: Of the kind that wrote it.
        checkpoint: The checkpoint.
        state: The folder to load the engine from: the checkpoint, or its universal form for this world size.
    """
    engine.load(state)
    own = _random_state_file(checkpoint)
    if own.is_file() and read_manifest(checkpoint).world_size == distributed.world_size():
        for name, value in load_file(own).items():
            torch.set_rng_state(value) if name == "cpu" else torch.cuda.set_rng_state(value)
    return Progress(**json.loads((checkpoint / PROGRESS).read_text()))


def set_aside_newer(folder: RunFolder, step: int) -> list[Path]:
    """Renames the checkpoints after a step, so that they are kept and not resumed from by themselves.

    For a run that resumes from an older one of its checkpoints. One process writes.

    Args:
        folder: The run folder.
        step: What the run resumes after.

    Returns:
        Their new places, from which a run may be resumed by name.
    """
    names = {path: path.name.lstrip(".").removesuffix(REPLACED) for path in complete_checkpoints(folder)}
    newer = [path for path, name in names.items() if name > folder.checkpoint(step).name]
    aside = [path.with_name(f"{ASIDE}{names[path]}") for path in newer]
    for path, place in zip(newer, aside, strict=True):
        shutil.rmtree(place, ignore_errors=True)
        path.rename(place)
    return aside


def _prepare(building: Path, progress: Progress) -> None:
    if distributed.is_main():
        shutil.rmtree(building, ignore_errors=True)
        (building / ENGINE_TAG).mkdir(parents=True)
        (building / "rng").mkdir()
        (building / PROGRESS).write_text(json.dumps(asdict(progress)))


def _publish(
    manifest: Manifest, building: Path, final: Path, folder: RunFolder, keep_last: int
) -> list[Path]:
    """Signs the checkpoint and renames it into its place.

    Returns:
        On the main rank, what is to be removed, under names that are no checkpoints: those that it makes
        obsolete, and what a killed process left.
    """
    if not distributed.is_main():
        return []
    there = {str(path.relative_to(building)): path for path in building.rglob("*") if path.is_file()}
    rest = {name: digest_of(sync(path)) for name, path in sorted(there.items()) if name not in manifest.files}
    write_manifest(manifest.with_files(rest), building, folder)
    publish_folder(building, final)
    folder.no_checkpoint_yet.unlink(missing_ok=True)
    abandoned = [*final.parent.glob(f".step_*{WRITING}")]
    # A run that was resumed from an earlier checkpoint writes those after it anew.
    given_up = [path for path in complete_checkpoints(folder) if path.name > final.name]
    old = complete_checkpoints(folder)[: -keep_last - len(given_up)]
    obsolete = [(path, temporary_of(path.with_name(path.name.lstrip(".")))) for path in (*given_up, *old)]
    for path, place in obsolete:
        path.rename(place)
    return abandoned + [place for _, place in obsolete]


def _random_state_file(checkpoint: Path) -> Path:
    return checkpoint / "rng" / f"rank_{distributed.rank():05d}.safetensors"


def _random_states() -> dict[str, torch.Tensor]:
    """This rank's, by device, as they are now."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _write_random_states(states: dict[str, torch.Tensor], building: Path) -> Path:
    write_file(_random_state_file(building), save(states))
    return _random_state_file(building)


def _cause(error: BaseException) -> str:
    """Why a file could not be written: the system's own words, where the libraries between have kept them.

    torch.save loses them, and what it raises last is a consequence, "unexpected pos".
    """
    chain = [error]
    while (before := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(before)
    system = next((link for link in chain if isinstance(link, OSError)), None)
    said = " ".join(str(system or error).split())
    lost = system is None and isinstance(error, RuntimeError) and TORCHS_WRITER.search(said)
    return f"the disk did not take all bytes, torch does not say why: {said}" if lost else said


def _on_all_ranks(work: Callable[[], T], building: Path) -> list[T]:
    """Every rank's result; if one could not write, `building` is removed and all ranks raise UserError."""
    result: T | None = None
    problem: str | None = None
    try:
        result = work()
    except CANNOT_WRITE as error:
        problem = _cause(error)
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
            f"{free / 1e6:,.1f} MB are free there). Earlier checkpoints are valid: make room, and run the "
            "same command again to resume from the newest"
        )
    return [result for result, _ in outcomes if result is not None]
