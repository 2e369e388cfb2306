"""Checkpoints: written beside, digested, renamed last. One without a valid manifest does not exist.

What a run needs to go on is listed in one place: the engine's state (weights, optimizer) and `Progress`.
There is no random state: dropout is off and the order of the data is a function of (seed, epoch).
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from dpo import distributed
from dpo.engine import Engine
from dpo.errors import UserError

MANIFEST = "manifest.json"
PROGRESS = "progress.json"


@dataclass(slots=True, kw_only=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    """Optimizer steps done; with the plan it fixes epoch and position."""
    num_tokens: int = 0
    """Tokens trained on so far, without padding."""
    best_loss: float | None = None
    """Lowest held-out loss so far, in nats."""


def save_checkpoint(engine: Engine, progress: Progress, run_dir: Path, keep_last: int) -> Path:
    """Writes checkpoints/step_00000100 (eight digits) and then removes old ones. All ranks must call it.

    Args:
        engine: Its weights and optimizer state.
        progress: Where the run stands.
        run_dir: The run folder, on storage that all ranks share.
        keep_last: How many complete checkpoints stay.
    """
    final = run_dir / "checkpoints" / f"step_{progress.step:08d}"
    building = final.with_name(f".{final.name}.writing")
    if distributed.is_main():
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        (building / PROGRESS).write_text(json.dumps(asdict(progress)))
    distributed.barrier()
    engine.save(building)
    distributed.barrier()
    if distributed.is_main():
        files = {str(path.relative_to(building)): _digest(path) for path in _files(building)}
        manifest = {"world_size": distributed.world_size(), "engine": engine.kind, "files": files}
        (building / MANIFEST).write_text(json.dumps(manifest, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        building.rename(final)
        # A run that went on from an earlier checkpoint has given up those after it, and records them anew.
        given_up = [folder for folder in _complete(run_dir) if folder.name > final.name]
        for old in (*given_up, *_complete(run_dir)[: -keep_last - len(given_up)]):
            shutil.rmtree(old)
    distributed.barrier()
    return final


def load_checkpoint(engine: Engine, folder: Path) -> Progress:
    """Restores engine and progress after every file matched its digest. All ranks must call it.

    Raises:
        UserError: The checkpoint was written by another number of ranks or another engine.
    """
    manifest = json.loads((folder / MANIFEST).read_text())
    here = (distributed.world_size(), engine.kind)
    if (manifest["world_size"], manifest["engine"]) != here:
        raise UserError(
            f"{folder}: written by {manifest['world_size']} rank(s) with {manifest['engine']}; this run has "
            f"{here[0]} with {here[1]}. Launch it the same way, or start in another run_dir"
        )
    engine.load(folder)
    return Progress(**json.loads((folder / PROGRESS).read_text()))


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint whose files all match their digests, or None. Rank 0 reads, all ranks learn."""
    found = None
    if distributed.is_main():
        found = next((folder for folder in reversed(_complete(run_dir)) if is_valid(folder)), None)
    return distributed.from_main(found)


def is_valid(folder: Path) -> bool:
    """Whether the folder has a manifest and every file in it has the size and digest recorded there."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        matching = all(_digest(folder / name) == recorded for name, recorded in files.items())
        return matching and PROGRESS in files
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _complete(run_dir: Path) -> list[Path]:
    """Checkpoints with a manifest, oldest first."""
    return sorted(path.parent for path in (run_dir / "checkpoints").glob(f"step_*/{MANIFEST}"))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _digest(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
