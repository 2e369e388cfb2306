"""Around the loop of `train` and `sft`: signals and watchdog before it, the checkpoint that it goes on from,
and the model that it leaves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from dpo import distributed, terminal
from dpo.config import Config, SftConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import BatchPlan
from dpo.engine.engine import Engine
from dpo.engine.reshard import universal_form
from dpo.errors import UserError
from dpo.guards.guard import Guard
from dpo.model.flops import forward_flops, known_peak, work_of
from dpo.model.lora import export_trained
from dpo.tracking.metrics import Evaluation
from dpo.tracking.monitor import Monitor
from dpo.tracking.run_folder import CONFIG_FILE, config_text, describe_run, flat_settings
from dpo.tracking.trackers import open_trackers
from dpo.train.checkpoint import Progress, load_checkpoint
from dpo.train.loop import Objective, Run, train

GROUPS_SHOWN = 8
PROMPT_CHARACTERS = 40


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
