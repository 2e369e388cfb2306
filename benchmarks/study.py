"""What the studies share: they run public commands, each once, and keep the outputs."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo.commands.journal import Journal, start
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.tracking.run_folder import RunFolder


@dataclass(slots=True, kw_only=True)
class Study:
    """A configuration, the model it starts from, and the folders of its data and runs."""

    model: str
    config: str
    """A YAML file; it names learning rate and dtype, also of what the study adds to it."""
    name: str
    """Data are in data/NAME, runs in runs/NAME."""
    journal: Journal = field(init=False)

    def __post_init__(self) -> None:
        os.environ.setdefault("PYTHON", sys.executable)
        self.runs.mkdir(parents=True, exist_ok=True)
        self.journal = Journal(file=self.runs / "done.json")

    @property
    def data(self) -> Path:
        """Folder of prepared data."""
        return Path("data") / self.name

    @property
    def runs(self) -> Path:
        """Folder of the runs."""
        return Path("runs") / self.name

    @property
    def settings(self) -> dict[str, dict[str, Any]]:
        """What the configuration's file says, by section."""
        return dict(yaml.safe_load(Path(self.config).read_text()))

    def once(self, name: str, command: list[str], product: Path) -> None:
        """Runs a command unless it was already done with the same arguments and configuration file."""
        self.journal.once(name, command, product, Path(self.config).read_text())

    def stage(self, name: str, *keys: str, product: Path) -> None:
        """Runs one of dpo's stages on this study's model."""
        given = ["--config", self.config, "--model.name_or_path", self.model, *keys]
        self.once(name, ["launch/run", name, *given], product)

    def precompute(self, run: str, *keys: str) -> None:
        """Fills the cache for a run that is not finished; computes only what is missing."""
        if not (RunFolder(self.runs / run).model() / "README.md").is_file():
            given = ["--config", self.config, "--model.name_or_path", self.model, *keys]
            start("precompute-ref", ["launch/run", "precompute-ref", *given])

    def train(self, run: str, *keys: str) -> None:
        """Trains a run in RUNS/run; the cache must hold its references."""
        folder = self.runs / run
        self.stage("train", *keys, "--run_dir", str(folder), product=RunFolder(folder).model() / "README.md")

    def evaluate(self, run: str, *keys: str) -> None:
        """Evaluates a run, with the keys that it was trained with."""
        folder = self.runs / run
        self.stage(
            "evaluate", *keys, "--run_dir", str(folder), product=RunFolder(folder).report() / "summary.json"
        )


def parser(doc: str | None, *, config: str, name: str) -> argparse.ArgumentParser:
    """The options of every study, and its first line as description."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--model", required=True, help="the reference: a folder or a hub name")
    made.add_argument("--config", default=config, help=f"what every run shares (default: {config})")
    made.add_argument("--name", default=name, help=f"data go to data/NAME, runs to runs/NAME ({name})")
    return made


def run_to_its_end(main: Callable[[], None]) -> None:
    """Runs a study's main; if a part fails, prints one line and exits with that part's status."""
    try:
        main()
    except (UserError, StoppedBySignal, RunFailed) as ended:
        print(f"study: {ended}", file=sys.stderr)
        sys.exit({UserError: 2, StoppedBySignal: 3}.get(type(ended), 1))
