"""A run's folder: where a run starts or goes on, and what it says of itself.

Nothing is overwritten: a folder that holds something else is refused, and so is going on with other settings.
"""

import json
import platform
import subprocess
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from dpo import distributed
from dpo.config import Config, SftConfig, flat

CONFIG_FILE = "config.yaml"
PACKAGES = ("dpo", "torch", "transformers", "accelerate", "deepspeed", "tokenizers", "datasets", "numpy")


def claim_run(config: Config | SftConfig) -> None:
    """Writes config.yaml (resolved), which makes the folder a run of ours; to be done after `find_start`."""
    if distributed.is_main():
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / CONFIG_FILE).write_text(config_text(config))


def describe_run(config: Config | SftConfig, *, engine: str) -> None:
    """Writes config.yaml and environment.json. No environment variable is recorded: they hold tokens.

    Args:
        config: The resolved configuration.
        engine: What the engine says of itself.
    """
    claim_run(config)
    if not distributed.is_main():
        return
    environment = {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "git_commit": _git_commit(),
        "world_size": distributed.world_size(),
        "engine": engine,
    }
    (Path(config.run_dir) / "environment.json").write_text(json.dumps(environment, indent=2))


def config_text(config: Config | SftConfig) -> str:
    """The resolved configuration as YAML that the commands read back."""
    return str(yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False))


def flat_settings(config: Config | SftConfig) -> dict[str, Any]:
    """Dotted key -> value of the resolved configuration."""
    return flat(json.loads(json.dumps(asdict(config))))


def _git_commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
