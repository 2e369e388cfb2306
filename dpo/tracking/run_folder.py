"""A run's folder: the name and place of every file that a run leaves, and what it says of itself.

Imports no torch: the command line writes exit.json through it and must stay quick.
"""

import hashlib
import itertools
import json
import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from dpo.errors import UserError
from dpo.files import UNIVERSAL, leftovers_of, remove, write_file

PACKAGES = (
    "cached-dpo",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "tokenizers",
    "datasets",
    "numpy",
)


@dataclass(frozen=True)
class RunFolder:
    """The places in RUN_DIR."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration; with `exit_record` it marks the folder as a run."""
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, commit, world size and engine."""
        return self.path / "environment.json"

    @property
    def history(self) -> Path:
        """One line per optimizer step and per evaluation."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The same numbers as curves."""
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """One folder per checkpoint."""
        return self.path / "checkpoints"

    def checkpoint(self, step: int) -> Path:
        """The checkpoint of an optimizer step."""
        return self.checkpoints / f"step_{step:08d}"

    @property
    def newest_checkpoint(self) -> Path | None:
        """The checkpoint of the latest step, as far as names tell; None where there is none."""
        return max(self.checkpoints.glob("step_*"), default=None)

    @property
    def no_checkpoint_yet(self) -> Path:
        """Is there from before the first step until the first checkpoint is complete."""
        return self.checkpoints / ".none_yet"

    @property
    def key(self) -> Path:
        """Signs the checkpoints."""
        return self.path / "checkpoint.key"

    @property
    def identity(self) -> str | None:
        """The same whenever this run is resumed; None for one without checkpoints, which cannot be."""
        key = self.key.read_bytes() if self.key.is_file() else None
        return None if key is None else hashlib.blake2b(key, digest_size=8, person=b"dpo run id").hexdigest()

    @property
    def reference(self) -> Path:
        """Which reference values the run started with."""
        return self.path / "reference.json"

    @property
    def moved_reference(self) -> Path:
        """The policy of an earlier step as a model, where that is the reference now."""
        return self.path / "moved_reference"

    @property
    def tokenizer(self) -> Path:
        """A tokenizer that `sft` trained."""
        return self.path / "tokenizer"

    @property
    def best(self) -> Path:
        """The model of the lowest held-out loss."""
        return self.path / "best"

    @property
    def snapshots(self) -> Path:
        """Models along the way."""
        return self.path / "snapshots"

    def model(self, snapshot: int | None = None) -> Path:
        """The finished model, or the snapshot of an optimizer step."""
        return self.path / "model" if snapshot is None else self.snapshots / f"step_{snapshot:08d}"

    def report(self, snapshot: int | None = None) -> Path:
        """The report on the finished model; a snapshot has its own."""
        return (self.path if snapshot is None else self.model(snapshot)) / "report"

    @property
    def best_of(self) -> Path:
        """What `best-of` writes."""
        return self.path / "best_of"

    @property
    def exit_record(self) -> Path:
        """How the last command ended."""
        return self.path / "exit.json"

    @property
    def previous_exit_record(self) -> Path:
        """The record before: launch/run puts it aside, so that an old one is never taken for a new one."""
        return self.path / ".exit.previous.json"

    @property
    def launcher_log(self) -> Path:
        """What the launcher said when ranks failed; the only file of a run that was killed at its start."""
        return self.path / "launcher.log"

    @property
    def stacks(self) -> Path:
        """The stacks of all threads of a run that got stuck, one file per rank."""
        return self.path / "stacks"

    @property
    def lock(self) -> Path:
        """Who trains there; see `dpo.tracking.run_lock`."""
        return self.path / "lock.json"

    @property
    def is_run(self) -> bool:
        """Whether a command of ours made this folder."""
        marks = (self.config, self.exit_record, self.previous_exit_record, self.lock)
        return any(path.is_file() for path in marks) or self.stacks.is_dir()

    @property
    def may_be_written(self) -> bool:
        """Whether the folder is a run of ours, not there yet, or empty but for what the launcher said."""
        if not self.path.exists():
            return True
        return self.path.is_dir() and (self.is_run or not {*self.path.iterdir()} - {self.launcher_log})

    @property
    def unused_name(self) -> Path:
        """The first of RUN_DIR_2, RUN_DIR_3, ... that is not there yet."""
        names = (self.path.with_name(f"{self.path.name}_{number}") for number in itertools.count(2))
        return next(path for path in names if not path.exists())

    def settings(self) -> dict[str, Any] | None:
        """The configuration that the run was started with, nested; None where none is recorded.

        Raises:
            UserError: config.yaml is damaged.
        """
        try:
            found = yaml.safe_load(self.config.read_text())
        except FileNotFoundError:
            return None
        except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
            found = error
        if not isinstance(found, dict):
            raise UserError(
                f"{self.config}: not the configuration of a run ({found!r}); put the file back, or choose "
                "another run_dir"
            )
        return found

    def claim(self, settings: dict[str, Any]) -> None:
        """Writes config.yaml, which makes the folder a run of ours, and follows links. One process writes.

        Args:
            settings: The resolved configuration, nested; see `dpo.config.resolved`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        for link in (self.checkpoints, self.snapshots, self.tensorboard):  # to a big disk
            if link.is_symlink():
                link.resolve().mkdir(parents=True, exist_ok=True)
        text = settings_text(settings)
        if not (self.config.is_file() and self.config.read_text() == text):
            write_file(self.config, text)

    def remove_leftovers(self) -> None:
        """Removes what killed processes of this run left half written. Only its holder may call it."""
        files = (
            self.config,
            self.environment,
            self.history,
            self.key,
            self.reference,
            self.no_checkpoint_yet,
            self.exit_record,
        )
        folders = (self.model(), self.best, self.moved_reference, self.tokenizer)
        steps = {
            _final(path) for place in (self.checkpoints, self.snapshots) for path in place.glob(".step_*")
        }
        for place in (*files, *folders, *steps):
            for left in leftovers_of(place):
                remove(left)
        for left in self.checkpoints.glob(f".*{UNIVERSAL}"):
            remove(left)

    def describe(self, *, world_size: int, engine: str) -> None:
        """Writes environment.json. It records no environment variable: they hold secrets.

        Args:
            world_size: Number of ranks.
            engine: As the engine describes itself.
        """
        environment = {
            "python": platform.python_version(),
            "packages": {name: version(name) for name in PACKAGES},
            "git_commit": _git_commit(),
            "world_size": world_size,
            "engine": engine,
        }
        write_file(self.environment, json.dumps(environment, indent=2))


def _final(left: Path) -> Path:
    """The place of what was being written as `.step_00000004.writing` or the like."""
    return left.with_name(left.name[1:].partition(".")[0])


def settings_text(settings: dict[str, Any]) -> str:
    """The resolved configuration as YAML that the commands read back."""
    return str(yaml.safe_dump(settings, sort_keys=False))


def _git_commit() -> str | None:
    """The commit of this code; None if no repository tracks it, such as one around an installed copy."""
    here = Path(__file__)
    try:
        for arguments in (["ls-files", "--error-unmatch", here.name], ["rev-parse", "HEAD"]):
            result = subprocess.run(
                ["git", "-C", str(here.parent), *arguments],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
