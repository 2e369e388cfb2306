"""Checkpoints of an engine that writes one number, for the tests of checkpoints and of their manifests."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from dpo.tracking.run_folder import RunFolder
from dpo.train.checkpoint import Progress, save_checkpoint
from dpo.train.manifest import NotValid, complete_checkpoints, read_manifest, verify


@dataclass
class FakeEngine:
    """Writes one number where the real one writes weights and optimizer state."""

    state: str = "start"
    kind: str = "one device"
    fails: bool = False
    may_write: Event = field(default_factory=Event)

    def __post_init__(self) -> None:
        self.may_write.set()

    def save(self, folder: Path, *, copied: bool) -> Callable[[], list[Path]]:
        state = self.state

        def write() -> list[Path]:
            self.may_write.wait(60)
            (folder / "deep").mkdir()
            (folder / "deep" / "state").write_text(state if copied else self.state)
            if self.fails:
                raise OSError("disk full")
            return [folder / "deep" / "state"]

        return write

    def load(self, folder: Path) -> None:
        self.state = (folder / "deep" / "state").read_text()


def save(run_dir: Path, *steps: int, keep_last: int = 9) -> Path:
    for step in steps:
        engine: Any = FakeEngine(f"state {step}")
        folder = save_checkpoint(
            engine, Progress(step=step, num_tokens=10 * step), RunFolder(run_dir), keep_last, {}
        )
    return folder


def problem_of(folder: Path) -> str | None:
    try:
        verify(folder, read_manifest(folder).files)
    except NotValid as error:
        return str(error)
    return None


def newest_checkpoint(run_dir: Path) -> Path | None:
    return next(
        (f for f in reversed(complete_checkpoints(RunFolder(run_dir))) if problem_of(f) is None), None
    )


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())
