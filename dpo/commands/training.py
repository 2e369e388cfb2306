"""What `train` and `sft` have in common: a guarded run from start or checkpoint to the exported model.

They differ in how they build the session and in what their summary shows.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from dpo import distributed, terminal
from dpo.commands.amount import hardly_any, steps_of
from dpo.commands.inputs import quieten_libraries
from dpo.config import Config, SftConfig, SftTrainConfig, TrainConfig
from dpo.data.dataset import TokenizedDataset
from dpo.engine.engine import Engine
from dpo.guards.guard import Guard
from dpo.model.probe_trees import probe_trees
from dpo.report import labels
from dpo.tracking.hub import check_repository, push
from dpo.tracking.run_folder import RunFolder
from dpo.tracking.trackers import check_trackers
from dpo.train.loop import train as run_loop
from dpo.train.session import Session

Configuration = TypeVar("Configuration", Config, SftConfig)


def run_training(
    command: str, config: Configuration, build: Callable[[Configuration, Guard], Session]
) -> Session:
    """Runs a training to its end and exports the model to RUN_DIR/model.

    Args:
        command: train or sft.
        config: The configuration.
        build: Makes the session, with everything loaded; called on all ranks.
    """
    quieten_libraries()
    check_trackers(config.train.trackers)
    repository = config.train.push_to_hub
    if repository is not None:
        distributed.on_main(lambda: check_repository(repository))
    folder = RunFolder(Path(config.run_dir))
    with Guard(folder, command, config.train.stuck_after_seconds) as guard:
        session = build(config, guard)
        with session.opened():
            run_loop(session)
        session.export(folder.model())
        session.finish_mirror()
    if repository is not None:
        distributed.on_main(lambda: push(folder.model(), repository))
    return session


def summarize(command: str, session: Session, shown: Sequence[str], following: str = "") -> None:
    """Prints the summary of a finished training.

    Args:
        command: train or sft.
        session: What ran.
        shown: Names of the held-out metrics to show.
        following: The command to run next, or nothing.
    """
    if session.evaluated:
        numbers = (
            f"{labels.full(name).removeprefix('held-out ')} {session.evaluated[name]:.4f}"
            for name in shown
            if name in session.evaluated
        )
        of = labels.counted(session.evaluated, "eval/loss")
        result = f"held-out {', '.join(numbers)}{f' of {of}' if of else ''}"
    elif session.evaluate is None:
        result = "no held-out data, so nothing was evaluated"
    else:
        result = "it had finished already"
    skipped = session.progress.skipped
    note = f"; {skipped} steps were skipped: see above" if skipped else ""
    train = session.options
    assert isinstance(train, TrainConfig | SftTrainConfig)
    mind = [hardly_any(session.plan.num_steps, train), labels.few(session.evaluated)]
    terminal.summary(
        command,
        {
            "trained": f"{steps_of(session.plan.num_steps, train)} on {session.description}{note}",
            "result": result,
            "mind": "\n".join(filter(None, mind)),
            "model": str(session.folder.model()),
            "curves": f"tensorboard --logdir {session.folder.path}",
            "next": following,
        },
    )


def settle_layout(policy: Engine, datasets: Sequence[TokenizedDataset]) -> None:
    """Settles the policy's layout on trees of these data sets; warns of what was rejected."""
    terminal.warning(*policy.settle_layout(probe_trees(datasets)).notes)
