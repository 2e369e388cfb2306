"""Where a run starts: afresh, from a checkpoint, or not at all."""

from functools import partial
from pathlib import Path

import yaml

from dpo import distributed
from dpo.config import Config, SftConfig, flat
from dpo.errors import UserError
from dpo.tracking.history import read_history
from dpo.tracking.run_folder import CONFIG_FILE, flat_settings
from dpo.train.checkpoint import complete_checkpoints
from dpo.train.manifest import NotValid, read_manifest, verify

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
    "train.resume_allow",
    "train.stuck_after_seconds",
    "train.peak_tflops",
    "train.trackers",
    "train.max_skipped_steps",
    "train.keep_last",
    "train.keep_best",
    "train.checkpoint_every",
    "train.evaluate_every",
    "train.snapshot_every",
    "train.max_tokens_per_micro_batch",
    "model.gradient_checkpointing",
    "model.attention",
    "model.share_prompts",
    "model.lora.export",
)


def find_start(config: Config | SftConfig, *, thorough: bool = True) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, or None to start afresh. All ranks must call it.

    Args:
        config: The resolved configuration.
        thorough: Compare every file of the checkpoint with its digest; else its manifest is enough.

    Returns:
        The checkpoint, and what a person should know: newer ones that are not valid, a run that starts again.

    Raises:
        UserError: The folder holds something else, or a run that cannot go on, or one with other settings.
    """
    run_dir, resume = Path(config.run_dir), config.train.resume
    look = _find_problem if thorough else _find_missing
    recorded, candidates = distributed.on_main(lambda: _look_into(run_dir, resume))
    if resume not in ("auto", "never"):
        checkpoint = Path(resume)
        if problem := look(checkpoint):
            raise UserError(f"train.resume: {checkpoint} cannot be used: {problem}")
        for folder in {checkpoint.absolute().parents[1], run_dir.absolute()}:  # a run may branch off another
            distributed.on_main(partial(_refuse_other_settings, config, folder))
        return checkpoint, []
    notes: list[str] = []
    for checkpoint in reversed(candidates):
        problem = look(checkpoint)
        if problem is None:
            distributed.on_main(lambda: _refuse_other_settings(config, run_dir))
            return checkpoint, notes
        notes.append(f"checkpoint {checkpoint} is not used: {problem}")
    if recorded and not candidates and distributed.on_main(lambda: _had_none_to_write(run_dir, recorded)):
        distributed.on_main(lambda: _refuse_other_settings(config, run_dir))
        return None, [f"{run_dir} ended after step {recorded}, before its first checkpoint: it starts again"]
    if recorded or candidates:
        raise UserError(
            f"run_dir: {run_dir} records {recorded} steps but has no valid checkpoint; choose another "
            f"run_dir, or delete this one to start again (train.checkpoint_every makes runs resumable)"
            + "".join(f"\n  {note}" for note in notes)
        )
    return None, []


def check_fingerprints(config: Config | SftConfig, start: Path, now: dict[str, str]) -> None:
    """Raises UserError if data, or an adapter's base, has another content under the same name than when the
    checkpoint was made.

    Args:
        config: Its train.resume_allow lets changes through by name.
        start: A verified checkpoint.
        now: Name -> digest of today's content.
    """
    then = read_manifest(start).fingerprints
    allowed = config.train.resume_allow.split(",")
    changed = [
        f"{name}: content {then.get(name, 'none')[:12]} -> {now.get(name, 'none')[:12]}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name) and name not in allowed
    ]
    if changed:
        raise UserError(
            f"{start}: was made on other content, and a resumed run must be the same: {'; '.join(changed)}. "
            "Put it back, choose another run_dir, or let it through: --train.resume_allow "
            + ",".join(change.partition(":")[0] for change in changed)
        )


def _look_into(run_dir: Path, resume: str) -> tuple[int, list[Path]]:
    """Recorded steps and checkpoints of a folder that may be used; raises UserError."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(f"run_dir: {run_dir} is a file; expected a folder to write to")
    recorded, candidates = _recorded_steps(run_dir), complete_checkpoints(run_dir)
    occupied = run_dir.is_dir() and any(run_dir.iterdir())
    if resume == "never" and (recorded or candidates):
        raise UserError(
            f"run_dir: {run_dir} holds a run of {recorded} steps and train.resume is never; choose another"
        )
    if occupied and not (run_dir / CONFIG_FILE).is_file() and not (run_dir / "exit.json").is_file():
        raise UserError(
            f"run_dir: {run_dir} is not empty and not a run of ours; choose another run_dir or empty it"
        )
    return recorded, candidates


def _find_missing(checkpoint: Path) -> str | None:
    """What its manifest alone can tell."""
    try:
        read_manifest(checkpoint)
    except NotValid as error:
        return str(error)
    return None


def _had_none_to_write(run_dir: Path, recorded: int) -> bool:
    """Whether the run was to write checkpoints, and died before the first."""
    try:
        every = int(yaml.safe_load((run_dir / CONFIG_FILE).read_text())["train"]["checkpoint_every"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return False
    return recorded < every and not (run_dir / "model").exists()


def _find_problem(checkpoint: Path) -> str | None:
    """Signature, size and digest of every file, each rank a part of them."""

    def own_part() -> None:
        files = read_manifest(checkpoint).files
        verify(checkpoint, {name: files[name] for name in distributed.share_of(sorted(files))})

    try:
        own_part()
        found: str | None = None
    except NotValid as error:
        found = str(error)
    return next((problem for problem in distributed.gather_objects(found) if problem), None)


def _refuse_other_settings(config: Config | SftConfig, run_dir: Path) -> None:
    file = run_dir / CONFIG_FILE
    if not file.is_file():
        return
    then, now = flat(yaml.safe_load(file.read_text())), flat_settings(config)
    free = (*FREE_TO_CHANGE, *filter(None, config.train.resume_allow.split(",")))
    changed = {
        key: f"{key}: {then.get(key)} -> {now.get(key)}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in free)
    }
    if changed:
        raise UserError(
            f"run_dir: {run_dir} was started with other settings, and a resumed run must be the same run: "
            f"{'; '.join(changed.values())}. Put them back, choose another run_dir, or let them through: "
            f"--train.resume_allow {','.join(changed)}"
        )


def _recorded_steps(run_dir: Path) -> int:
    """The last optimizer step in metrics.jsonl, 0 if there is none."""
    return max((int(line["step"]) for line in read_history(run_dir)), default=0)
