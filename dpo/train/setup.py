"""Before the loop."""

from pathlib import Path

from accelerate import Accelerator

from dpo import distributed, terminal
from dpo.config import Config, SftConfig
from dpo.engine import engine
from dpo.engine.reshard import needs_universal_form
from dpo.model.load import DTYPES
from dpo.model.lora import num_adapter_parameters
from dpo.reference.identity import reference_identity
from dpo.train.disk_space import checkpoint_bytes, exported_bytes, require_space
from dpo.train.manifest import read_manifest
from dpo.train.resume import check_fingerprints, find_start


def start_of(config: Config | SftConfig) -> Path | None:
    """The checkpoint to go on from, or None; says which newer ones are not valid. All ranks must call it."""
    start, notes = find_start(config)
    terminal.warning(*notes)
    distributed.require_shared(Path(config.run_dir), "run_dir")
    return start


def check_start(config: Config | SftConfig, start: Path | None, fingerprints: dict[str, str]) -> bool:
    """Whether the checkpoint needs its universal form.

    Raises:
        UserError: It belongs to other data or another model, or no way leads from its engine to this one.
    """
    if start is None:
        return False
    distributed.on_main(lambda: check_fingerprints(config, start, fingerprints))
    written = read_manifest(start)
    return needs_universal_form(start, written.engine, written.world_size, engine.kind_here())


def base_fingerprint(config: Config | SftConfig, memory: Path) -> dict[str, str]:
    """Name -> digest of the base that an adapter is trained on, since checkpoints do not hold it; else empty.

    Args:
        config: The resolved configuration.
        memory: Where hashes of files are remembered.
    """
    if config.model.lora is None:
        return {}
    identity = distributed.on_main(lambda: reference_identity(config.model, memory))
    return {"model.name_or_path": identity.digest}


def check_space(
    config: Config | SftConfig, num_parameters: int, accelerator: Accelerator, num_steps: int
) -> None:
    """Raises UserError on all ranks if the disk cannot hold the checkpoints.

    Args:
        config: The resolved configuration.
        num_parameters: Of the whole model.
        accelerator: From `engine.start`.
        num_steps: Optimizer steps of the whole run.
    """
    sharded = engine.kind_here().startswith("DeepSpeed")

    def check() -> None:
        trained = num_parameters
        if config.model.lora is not None:
            with engine.unsharded(accelerator):
                trained = num_adapter_parameters(config.model)
        one = checkpoint_bytes(trained, DTYPES[config.model.dtype], config.train, sharded=sharded)
        model = exported_bytes(config.model, num_parameters, trained)
        require_space(Path(config.run_dir), one, model, config.train, num_steps)

    distributed.on_main(check)
