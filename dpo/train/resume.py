"""Where a run starts: afresh, from a checkpoint, or not at all.

Nothing is overwritten: a folder that holds something else is refused, and so is a run with other settings.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dpo import distributed
from dpo.config import OptimizationConfig, flat
from dpo.errors import UserError
from dpo.tracking.history import last_step, load_history
from dpo.tracking.run_folder import RunFolder
from dpo.train.manifest import NotValid, complete_checkpoints, read_manifest, run_of, verify

FREE_TO_CHANGE = (  # when a run is resumed: they change no weight
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
    "data.num_workers",
    "train.resume",
    "train.resume_allow",
    "train.stuck_after_seconds",
    "train.peak_tflops",
    "train.trackers",
    "train.push_to_hub",
    "train.mirror",
    "train.max_skipped_steps",
    "train.keep_last",
    "train.keep_best",
    "train.checkpoint_async",
    "train.checkpoint_every",
    "train.evaluate_every",
    "train.snapshot_every",
    "train.max_tokens_per_micro_batch",
    "train.backward",
    "model.gradient_checkpointing",
    "model.offload_activations",
    "model.attention",
    "model.compile",
    "model.share_prompts",
    "model.lora.export",
)


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run was told: its resolved configuration."""

    values: Mapping[str, Any]
    """Nested; see `dpo.config.resolved`."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> default, for keys that a run of an older version did not record."""


@dataclass(frozen=True, slots=True)
class Fresh:
    """Start with step 1."""

    notes: tuple[str, ...] = ()
    """What a person should know."""


@dataclass(frozen=True, slots=True)
class Resume:
    """Continue after a checkpoint that was verified."""

    checkpoint: Path
    notes: tuple[str, ...] = ()
    """Which newer checkpoints are not valid, and why."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Do not start."""

    reason: str
    """Where, what, what was expected, and what to do."""


Start = Fresh | Resume | Refuse


def find_start(
    folder: RunFolder, settings: Settings, options: OptimizationConfig, *, thorough: bool = True
) -> Start:
    """Decides where a run starts, alike on all ranks, which must all call it.

    Args:
        folder: The run folder.
        settings: The resolved configuration.
        options: What to resume from, and which keys may differ.
        thorough: Compare every file of the checkpoint with its digest; else the manifest is enough.
    """
    find_problem = _find_problem if thorough else _find_missing
    if options.resume not in ("auto", "never"):
        checkpoint = Path(options.resume)
        if problem := find_problem(checkpoint):
            return Refuse(f"train.resume: {checkpoint} cannot be used: {problem}")
        origins = {run_of(checkpoint), RunFolder(folder.path.absolute())}  # a run may branch off another
        return _same_settings(Resume(checkpoint), origins, settings, options)
    recorded, candidates, refused = distributed.on_main(lambda: _look_into(folder, options.resume))
    if refused:
        return Refuse(refused)
    notes: list[str] = []
    for checkpoint in reversed(candidates):
        problem = find_problem(checkpoint)
        if problem is None:
            distributed.on_main(partial(_require_history, folder, checkpoint))
            return _same_settings(Resume(checkpoint, tuple(notes)), {folder}, settings, options)
        notes.append(f"checkpoint {checkpoint} is not used: {problem}")
    if not recorded and not candidates:
        return Fresh()
    if not candidates and distributed.on_main(lambda: _ended_before_first_checkpoint(folder, recorded)):
        note = f"{folder.path} ended after step {recorded}, before its first checkpoint: it starts again"
        return _same_settings(Fresh((note,)), {folder}, settings, options)
    return Refuse("\n  ".join([distributed.on_main(partial(_cannot_start, folder, recorded)), *notes]))


def check_fingerprints(checkpoint: Path, now: Mapping[str, str], options: OptimizationConfig) -> None:
    """Raises UserError if data, or an adapter's base, has other content than when the checkpoint was made.

    Args:
        checkpoint: A verified checkpoint.
        now: Name -> digest of the present content.
        options: `resume_allow` lets changes through by name.
    """
    then = read_manifest(checkpoint).fingerprints
    allowed = options.resume_allow.split(",")
    changed = [
        f"{name}: content {then.get(name, 'none')[:12]} -> {now.get(name, 'none')[:12]}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name) and name not in allowed
    ]
    if changed:
        raise UserError(
            f"{checkpoint}: was made from other content, and a resumed run must be the same: "
            f"{'; '.join(changed)}. Restore it, choose another run_dir, or allow the change: "
            "--train.resume_allow " + ",".join(change.partition(":")[0] for change in changed)
        )


def _cannot_start(folder: RunFolder, recorded: int) -> str:
    """Why a folder with steps and without a checkpoint to resume from is left alone, and what to do."""
    if folder.model().exists():
        return (
            f"run_dir: {folder.path} holds a finished run of {recorded} steps: choose another run_dir "
            f"(--run_dir {folder.unused_name} is free), or delete it to train it again"
        )
    return (
        f"run_dir: {folder.path} records {recorded} steps but has no valid checkpoint: choose another "
        f"run_dir (--run_dir {folder.unused_name} is free), or delete this one to start again "
        "(train.checkpoint_every makes runs resumable)"
    )


def _look_into(folder: RunFolder, resume: str) -> tuple[int, list[Path], str]:
    """Recorded steps and checkpoints of a folder, and why it may not be used, or nothing."""
    path = folder.path
    if path.exists() and not path.is_dir():
        return 0, [], f"run_dir: {path} is a file; expected a folder to write to"
    recorded, candidates = last_step(folder), complete_checkpoints(folder)
    if resume == "never" and (recorded or candidates):
        return (
            0,
            [],
            f"run_dir: {path} holds a run of {recorded} steps, and train.resume is never: choose another "
            f"run_dir (--run_dir {folder.unused_name} is free)",
        )
    if not folder.may_be_written:
        return (
            0,
            [],
            f"run_dir: {path} is not empty and not a run of ours; choose another or empty it",
        )
    return recorded, candidates, ""


def _require_history(folder: RunFolder, checkpoint: Path) -> None:
    """Raises UserError if metrics.jsonl is damaged before the checkpoint's step; after it, it is cut."""
    load_history(folder, until=read_manifest(checkpoint).step)


def _find_missing(checkpoint: Path) -> str | None:
    """What the manifest alone shows to be wrong with a checkpoint."""
    try:
        read_manifest(checkpoint)
    except NotValid as error:
        return str(error)
    return None


def _find_problem(checkpoint: Path) -> str | None:
    """What is wrong with signature, size or digest of a file; the ranks share the files."""

    def own_part() -> None:
        files = read_manifest(checkpoint).files
        verify(checkpoint, {name: files[name] for name in distributed.share_of(sorted(files))})

    try:
        own_part()
        found: str | None = None
    except NotValid as error:
        found = str(error)
    return next((problem for problem in distributed.gather_objects(found) if problem), None)


def _ended_before_first_checkpoint(folder: RunFolder, recorded: int) -> bool:
    """Whether the run was to write checkpoints, and died before it had finished the first."""
    try:
        every = int((folder.settings() or {})["train"]["checkpoint_every"])
    except (UserError, KeyError, TypeError, ValueError):
        return False
    none_yet = recorded < every or (every > 0 and folder.no_checkpoint_yet.is_file())
    return none_yet and not folder.model().exists()


def _same_settings(
    start: Fresh | Resume, origins: set[RunFolder], settings: Settings, options: OptimizationConfig
) -> Start:
    """`start`, or Refuse where a run that it continues was started with other settings."""
    reasons = distributed.on_main(
        lambda: [reason for origin in origins for reason in _other_settings(origin, settings, options)]
    )
    return Refuse(reasons[0]) if reasons else start


def _other_settings(origin: RunFolder, settings: Settings, options: OptimizationConfig) -> Iterator[str]:
    recorded = origin.settings()
    if recorded is None:
        return
    then, now = {**settings.defaults, **flat(recorded)}, flat(settings.values)
    free = (*FREE_TO_CHANGE, *filter(None, options.resume_allow.split(",")))
    changed = {
        key: f"{key}: {then.get(key)} -> {now.get(key)}"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key)
        and not any(key == name or key.startswith(f"{name}.") for name in free)
    }
    if changed:
        yield (
            f"run_dir: {origin.path} was started with other settings, and a resumed run must be the same: "
            f"{'; '.join(changed.values())}. Put them back, choose another run_dir (--run_dir "
            f"{origin.unused_name} is free), or allow the change: --train.resume_allow {','.join(changed)}"
        )
