"""Curves in other places than TensorBoard (W&B, MLflow and others), through Accelerate's trackers."""

from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from dpo import distributed, terminal
from dpo.errors import UserError

PROJECT = "dpo"


def check_trackers(names: list[str]) -> None:
    """Raises UserError for a tracker that is unknown, not installed, or TensorBoard, which is always on."""
    known = sorted({str(name) for name in LOGGER_TYPE_TO_CLASS} - {"tensorboard"})
    installed = {str(name) for name in get_available_trackers()}
    problems = [
        f"train.trackers: {name}; expected names of {', '.join(known)}"
        + (" (TensorBoard is always written)" if name == "tensorboard" else "")
        for name in names
        if name not in known
    ]
    problems += [
        f"train.trackers: {name} is not installed: pip install {name.replace('_', '-')}, or leave it out"
        for name in names
        if name in known and name not in installed
    ]
    if problems:
        raise UserError("\n".join(problems))


def open_trackers(
    names: list[str], run_dir: Path, settings: dict[str, Any], run_id: str | None, *, resumed: bool = False
) -> list[GeneralTracker]:
    """Opens them on the main process and gives them the settings; empty elsewhere. All ranks must call it.

    Args:
        names: Checked by `check_trackers`.
        run_dir: The run folder: its name names the run, and trackers write there.
        settings: Option -> value, flat.
        run_id: The same whenever the run is resumed, so that W&B goes on with one run; None: a new one.
        resumed: Whether the run has steps already: what cannot be opened is then said and left out.

    Raises:
        UserError: A new run's could not be opened: it is not logged in, or its server cannot be reached.
    """
    opened: list[GeneralTracker] = []
    own_options: dict[str, dict[str, Any]] = {
        "wandb": {"name": run_dir.name, "dir": str(run_dir), "id": run_id, "resume": "allow"},
        "mlflow": {"run_name": run_dir.name},
    }

    def open_on_main() -> None:
        for name in names:
            kind: Any = LOGGER_TYPE_TO_CLASS[name]
            place = [str(run_dir)] if kind.requires_logging_directory else []
            try:
                tracker = kind(PROJECT, *place, **own_options.get(name, {}))
                tracker.start()
                tracker.store_init_configuration(settings)
            except Exception as error:  # each has its own
                if resumed:
                    terminal.warning(
                        f"train.trackers: {name} could not be opened and receives nothing: {error}"
                    )
                    continue
                raise UserError(
                    f"train.trackers: {name} could not be opened ({error}): log in and check that its server "
                    "can be reached, or leave it out"
                ) from error
            opened.append(tracker)

    distributed.on_main(open_on_main)
    return opened
