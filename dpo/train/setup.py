"""What `train` and `sft` settle before the model is loaded: where the run starts, and whether it can end."""

from pathlib import Path

from accelerate import Accelerator

from dpo import distributed, terminal
from dpo.config import ModelConfig, OptimizationConfig
from dpo.engine.optimizer import OPTIMIZERS
from dpo.engine.reshard import needs_universal_form
from dpo.engine.world import kind_here, unsharded
from dpo.errors import UserError
from dpo.model.load import DTYPES
from dpo.model.lora import num_adapter_parameters
from dpo.reference.identity import reference_identity
from dpo.tracking.run_folder import RunFolder
from dpo.train.disk_space import checkpoint_bytes, exported_bytes, require_space
from dpo.train.manifest import read_manifest
from dpo.train.mirror import Mirror
from dpo.train.resume import Refuse, Resume, Settings, check_fingerprints, find_start


def start_of(folder: RunFolder, settings: Settings, options: OptimizationConfig) -> Path | None:
    """The checkpoint to resume from, or None for a fresh start. All ranks must call it.

    Raises:
        UserError: The run may not start, or the run folder is not shared by all ranks.
    """
    mirror = options.mirror
    if mirror is not None:
        distributed.on_main(lambda: Mirror(mirror, folder).restore())
    start = find_start(folder, settings, options)
    if isinstance(start, Refuse):
        raise UserError(start.reason)
    terminal.warning(*start.notes)
    distributed.require_shared(folder.path, "run_dir")
    distributed.on_main(folder.remove_leftovers)
    return start.checkpoint if isinstance(start, Resume) else None


def needs_resharding(
    checkpoint: Path | None, fingerprints: dict[str, str], options: OptimizationConfig
) -> bool:
    """Whether the checkpoint must be converted to its universal form for this number of ranks.

    Raises:
        UserError: It was made from other data or another model, or this engine cannot read it.
    """
    if checkpoint is None:
        return False
    distributed.on_main(lambda: check_fingerprints(checkpoint, fingerprints, options))
    written = read_manifest(checkpoint)
    resharded = needs_universal_form(checkpoint, written.engine, written.world_size, kind_here())
    if resharded and not OPTIMIZERS[options.optimizer].reshards:
        raise UserError(
            f"{checkpoint}: written by {written.world_size} rank(s), and DeepSpeed can convert the state of "
            f"adamw alone for another number of ranks, not that of {options.optimizer}: start it with as many"
        )
    return resharded


def base_fingerprint(model: ModelConfig, memory: Path) -> dict[str, str]:
    """Name -> digest of the base that an adapter is trained on, since checkpoints do not hold it; else empty.

    Args:
        model: With or without an adapter.
        memory: Folder in which file hashes are remembered.
    """
    if model.lora is None:
        return {}
    identity = distributed.on_main(lambda: reference_identity(model, memory))
    return {"model.name_or_path": identity.digest}


def check_space(
    folder: RunFolder,
    model: ModelConfig,
    options: OptimizationConfig,
    accelerator: Accelerator,
    *,
    num_parameters: int,
    num_steps: int,
    num_references: int = 0,
) -> None:
    """Raises UserError on all ranks if the disk cannot hold the checkpoints and models.

    Args:
        folder: Where they go.
        model: Its compute type and adapter.
        options: Optimizer, and how many checkpoints and models are kept.
        accelerator: From `dpo.engine.world.start`.
        num_parameters: Of the whole model.
        num_steps: Optimizer steps of the whole run.
        num_references: Models that are kept because the reference moves.
    """
    sharded = kind_here().startswith("DeepSpeed")

    def check() -> None:
        trained = num_parameters
        if model.lora is not None:
            with unsharded(accelerator):
                trained = num_adapter_parameters(model)
        one = checkpoint_bytes(trained, DTYPES[model.dtype], options, sharded=sharded)
        exported = exported_bytes(model, num_parameters, trained)
        require_space(folder.path, one, exported, options, num_steps, num_references)

    distributed.on_main(check)
