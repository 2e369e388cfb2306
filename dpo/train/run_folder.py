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
from dpo.config import Config, SftConfig
from dpo.errors import UserError
from dpo.train.checkpoint import is_valid, newest_checkpoint

CONFIG_FILE = "config.yaml"
FREE_TO_CHANGE = (  # between a run and its continuation: they change no weight
    "run_dir",
    "evaluate",
    "reference.cache_dir",
    "reference.max_tokens_per_batch",
    "reference.flush_every_seconds",
    "reference.sharding",
    "reference.store_token_logps",
    "reference.audit_rows",
    "data.cache_dir",
    "data.strict",
    "train.resume",
    "train.keep_last",
    "train.keep_best",
    "train.checkpoint_every",
    "train.evaluate_every",
    "train.max_tokens_per_micro_batch",
    "model.gradient_checkpointing",
    "model.attention",
    "model.share_prompts",
)
PACKAGES = ("dpo", "torch", "transformers", "accelerate", "deepspeed", "tokenizers", "datasets", "numpy")


def find_start(config: Config | SftConfig) -> Path | None:
    """The checkpoint to go on from, or None to start afresh.

    Raises:
        UserError: The folder holds something else, or a run that cannot go on, or one with other settings.
    """
    run_dir, resume = Path(config.run_dir), config.train.resume
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run_dir: {run_dir} is a file; expected a folder to write to")
    if resume not in ("auto", "never"):
        checkpoint = Path(resume)
        if not is_valid(checkpoint):
            raise UserError(
                f"train.resume: {checkpoint} is not a complete checkpoint (a digest differs or is missing)"
            )
        _refuse_other_settings(config, run_dir)
        return checkpoint
    recorded = _recorded_steps(run_dir)
    occupied = run_dir.is_dir() and any(run_dir.iterdir())
    if resume == "never" and recorded:
        raise UserError(
            f"run_dir: {run_dir} holds a run of {recorded} steps and train.resume is never; choose another"
        )
    if occupied and not (run_dir / CONFIG_FILE).is_file() and not (run_dir / "exit.json").is_file():
        raise UserError(
            f"run_dir: {run_dir} is not empty and not a run of ours; choose another run_dir or empty it"
        )
    if not recorded:
        return None
    _refuse_other_settings(config, run_dir)
    newest = newest_checkpoint(run_dir)
    if newest is None:
        raise UserError(
            f"run_dir: {run_dir} records {recorded} steps but has no valid checkpoint; choose "
            "another run_dir, or delete this one to start again (train.checkpoint_every makes runs resumable)"
        )
    return newest


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


def _refuse_other_settings(config: Config | SftConfig, run_dir: Path) -> None:
    file = run_dir / CONFIG_FILE
    if not file.is_file():
        return
    then, now = _flat(yaml.safe_load(file.read_text())), _flat(json.loads(json.dumps(asdict(config))))
    changed = [
        f"{key}: {then.get(key)} -> {now.get(key)}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in FREE_TO_CHANGE)
    ]
    if changed:
        raise UserError(
            f"run_dir: {run_dir} was started with other settings, and a resumed run must be the same run: "
            f"{'; '.join(changed)}. Put them back, or choose another run_dir"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, part in tree.items()
        for key, value in _flat(part, f"{prefix}.{name}".strip(".")).items()
    }


def _recorded_steps(run_dir: Path) -> int:
    """The last optimizer step in metrics.jsonl, 0 if there is none."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        return 0
    with path.open() as file:
        steps = [json.loads(line)["step"] for line in file if line.endswith("\n")]
    return max(steps, default=0)


def _git_commit() -> str | None:
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
