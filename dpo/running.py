"""Around the loop of `train` and `sft`: signals and watchdog before it, the checkpoint that it goes on from,
and the model that it leaves.
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from dpo import distributed, engine, terminal
from dpo.config import Config, SftConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import BatchPlan
from dpo.data.trees import TreeBatch
from dpo.engine import Engine
from dpo.errors import RunFailed, StoppedBySignal, UserError
from dpo.flops import forward_flops, known_peak, work_of
from dpo.model.load import DTYPES
from dpo.model.lora import export_trained, num_adapter_parameters
from dpo.monitor import Evaluation, Monitor
from dpo.reference.identity import reference_identity
from dpo.signals import StopRequests, end_with_launcher
from dpo.trackers import check_trackers, open_trackers
from dpo.train.checkpoint import Progress, load_checkpoint
from dpo.train.loop import Objective, Run, Stopping, train
from dpo.train.reshard import needs_universal_form, universal_form
from dpo.train.run_folder import (
    CONFIG_FILE,
    check_fingerprints,
    config_text,
    describe_run,
    find_start,
    flat_settings,
)
from dpo.train.space import checkpoint_bytes, exported_bytes, require_space
from dpo.watchdog import Watchdog

GROUPS_SHOWN = 8
PROMPT_CHARACTERS = 40


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What watches over a command: see `guarded`."""

    command: str
    """train or sft."""
    stop: StopRequests
    watchdog: Watchdog

    def score_only(self, policy: Engine) -> Callable[..., Tensor]:
        """`Engine.score_only` for an evaluation that a signal may end: raises `Stopping` on all ranks."""

        def score(batch: TreeBatch, *, per_token: bool = False) -> Tensor:
            self.watchdog.progress("evaluation")
            if distributed.any_rank(self.stop.requested):
                raise Stopping
            return policy.score_only(batch, per_token=per_token)

        return score


@contextmanager
def guarded(command: str, config: Config | SftConfig) -> Iterator[Guard]:
    """Joins the ranks; signals become wishes, and an error that another rank caused becomes its reason."""
    quiet()
    distributed.start()
    check_trackers(config.train.trackers)
    end_with_launcher()
    watchdog = Watchdog(Path(config.run_dir), command, config.train.stuck_after_seconds)
    with StopRequests() as stop, watchdog:
        try:
            yield Guard(command=command, stop=stop, watchdog=watchdog)
        except (UserError, StoppedBySignal, RunFailed) as error:
            watchdog.farewell(error)
            raise
        except Exception as error:
            reason = watchdog.explain(error)
            if reason is error:
                raise
            raise reason from error


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
    return needs_universal_form(start, engine.kind_here())


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One optimization, with everything loaded."""

    policy: Engine
    objective: Objective
    plan: BatchPlan
    tokenizer: PreTrainedTokenizerBase
    start: Path | None
    """The checkpoint to go on from."""
    universal: bool
    """Another number of ranks wrote it."""
    fingerprints: dict[str, str]
    evaluate: Callable[[], Evaluation] | None
    data: str
    """The training data, for people."""
    card: Callable[[dict[str, float]], str]
    """The model card, given what was measured."""


def optimize(config: Config | SftConfig, work: Work, guard: Guard) -> None:
    """Runs the loop from the start or from a checkpoint, and exports the model."""
    policy, run_dir = work.policy, Path(config.run_dir)
    torch.manual_seed(config.train.seed)  # for models that draw; ours have no dropout
    progress = _load(work, run_dir)
    describe_run(config, engine=policy.description)

    evaluated: dict[str, float] = {}

    def export(folder: Path) -> None:
        guard.watchdog.progress(f"writing {folder.name}")
        weights, card = policy.weights(), work.card(evaluated)

        def write() -> None:
            try:
                with policy.unsharded():
                    export_trained(config.model, policy.model, weights, work.tokenizer, folder, card)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{folder}: the model could not be written ({error}): make room, and the same command "
                    "goes on from the newest checkpoint"
                ) from error

        distributed.on_main(write)

    def describe(groups: list[int]) -> str:
        texts = (
            work.tokenizer.decode(work.objective.dataset[group].prompt) for group in groups[:GROUPS_SHOWN]
        )
        shown = [
            f"{group} ({text[:PROMPT_CHARACTERS]!r})" for group, text in zip(groups, texts, strict=False)
        ]
        more = f" and {len(groups) - GROUPS_SHOWN} more" if len(groups) > GROUPS_SHOWN else ""
        return f"data.train groups {', '.join(shown)}{more}"

    flops, peak = _operations(policy, work.objective.dataset, config)
    trackers = open_trackers(config.train.trackers, run_dir, flat_settings(config))
    with Monitor(
        run_dir,
        num_steps=work.plan.num_steps,
        first_step=progress.step,
        evaluated=progress.evaluated_step == progress.step,
        unit=work.objective.unit,
        trackers=trackers,
    ) as monitor:
        parameters = f"{policy.num_parameters / 1e6:.1f}M parameters"
        if policy.num_frozen:
            trained = policy.num_parameters - policy.num_frozen
            parameters += f", of which {trained / 1e6:.2f}M of an adapter are trained"
        terminal.note(f"{policy.description}; {parameters}; {work.data}")
        if work.start:
            terminal.note(f"going on after step {progress.step}, from {work.start}")
        monitor.text("config", f"```yaml\n{config_text(config)}```")
        run = Run(
            folder=run_dir,
            monitor=monitor,
            stop=guard.stop,
            watchdog=guard.watchdog,
            fingerprints=work.fingerprints,
            evaluate=work.evaluate,
            export=export,
            describe=describe,
            group_flops=flops,
            peak_flops=peak,
        )
        evaluated |= train(policy, work.objective, work.plan, config.train, progress, run)
    export(run_dir / "model")
    if evaluated:
        result = f"held-out {_metrics(evaluated)}"
    elif work.evaluate is None:
        result = "no held-out data, so nothing was evaluated"
    else:
        result = "it had ended already"
    skipped = f"; {progress.skipped} steps were skipped: see the lines above" if progress.skipped else ""
    preferences = isinstance(config, Config) and work.evaluate is not None
    terminal.summary(
        guard.command,
        {
            "trained": f"{work.plan.num_steps} steps on {work.data}{skipped}",
            "result": result,
            "model": str(run_dir / "model"),
            "curves": f"tensorboard --logdir {run_dir}",
            "next": f"dpo evaluate --config {run_dir / CONFIG_FILE}" if preferences else "",
        },
    )


def _operations(
    policy: Engine, dataset: TokenizedDataset, config: Config | SftConfig
) -> tuple[npt.NDArray[np.float64] | None, float | None]:
    """(G,) operations of each group's forward and backward pass, and what a device can do a second."""
    try:
        work = work_of(policy.model)
    except ValueError:
        return None, None
    passes = 2 if policy.num_frozen else 3  # the backward pass is two, and one less for frozen weights
    peak = config.train.peak_tflops and config.train.peak_tflops * 1e12
    if peak is None and policy.device.type == "cuda" and config.model.dtype == "bfloat16":
        peak = known_peak(torch.cuda.get_device_name())
    return passes * forward_flops(dataset, work), peak


def _load(work: Work, run_dir: Path) -> Progress:
    if work.start is None:
        return Progress()
    if not work.universal:
        return load_checkpoint(work.policy, work.start, work.start)
    terminal.note(f"making {work.start} fit {distributed.world_size()} rank(s)")
    with universal_form(work.start, run_dir) as state:
        return load_checkpoint(work.policy, work.start, state)


def _metrics(evaluated: dict[str, float]) -> str:
    shown = {
        "loss": "eval/loss",
        "reward accuracy": "eval/rewards/accuracies",
        "margin": "eval/rewards/margins",
    }
    return ", ".join(f"{label} {evaluated[name]:.4f}" for label, name in shown.items() if name in evaluated)


def quiet() -> None:
    """Silences what a user cannot act on: other libraries' progress notes and deprecations among
    themselves.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if terminal.mode() != "plain" or not sys.stderr.isatty():
        disable_progress_bar()  # of loading and writing weights
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
