"""What one training run is made of, and what it does besides steps: load, evaluate, export, describe.

`train`, `sft` and the tests build a `Session`; `dpo.train.loop` runs it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpo import alive, distributed, terminal
from dpo.config import ModelConfig, OptimizationConfig, flat
from dpo.data.dataset import TokenizedDataset
from dpo.data.plan import BatchPlan, Int64s
from dpo.data.trees import Layout, Tree, TreeBatch
from dpo.engine.engine import Engine
from dpo.engine.reshard import universal_form
from dpo.errors import UserError
from dpo.guards.guard import Guard
from dpo.model.files import first_line
from dpo.model.flops import forward_flops, known_peak, work_of
from dpo.model.load import DTYPES
from dpo.model.lora_export import export_trained
from dpo.tracking.metrics import Evaluation, MetricSums
from dpo.tracking.monitor import Monitor
from dpo.tracking.run_folder import RunFolder, settings_text
from dpo.tracking.trackers import open_trackers
from dpo.train.checkpoint import (
    Progress,
    load_checkpoint,
    prepare_checkpoints,
    set_aside_newer,
)
from dpo.train.disk_space import checkpoint_bytes, fits_memory, here
from dpo.train.mirror import Mirror
from dpo.train.moving_reference import MovingReference
from dpo.train.pending import PendingCheckpoint
from dpo.train.resume import Settings

GROUPS_SHOWN = 8
PROMPT_CHARACTERS = 40


class Objective(Protocol):
    """What a run minimizes."""

    @property
    def dataset(self) -> TokenizedDataset:
        """Where the groups are."""

    @property
    def unit(self) -> str:
        """What a step consists of, for the bar: pairs or sequences."""

    @property
    def per_token(self) -> bool:
        """Whether `loss` takes log-probs of tokens instead of sequences."""

    @property
    def aligned(self) -> bool:
        """Whether `loss` also takes log-probs that are aligned to samples, in a second column."""

    def count(self, groups: Int64s) -> float:
        """What the step's loss is divided by, such as its pairs or its completion tokens."""

    def num_units(self, groups: Int64s) -> int:
        """Pairs or sequences of these groups, for throughput."""

    @property
    def needs_whole_step(self) -> bool:
        """Whether `loss` must be given all of a rank's part of a step at once, on all ranks together."""

    def trees(self, groups: Int64s) -> list[Tree]:
        """Prompt and completions of each group, in the order of `batch`."""

    def batch(self, groups: Int64s, layout: Layout) -> TreeBatch:
        """The tensors of a micro-batch; without groups a batch that predicts nothing."""

    def loss(self, logps: Tensor, batch: TreeBatch, sums: MetricSums) -> Tensor:
        """The sum (not the mean) of the losses of a micro-batch, in nats.

        Args:
            logps: (S,) the policy's log-probs, or (N,) those of tokens, with gradient; (S, 2) if `aligned`.
            batch: What was scored.
            sums: Receives loss and metrics of the real samples, under names without prefix, and as totals the
                named sums that the loss needs of the whole step.
        """

    def observe(self, totals: dict[str, float]) -> dict[str, float]:
        """Receives the totals of a finished step over all ranks; returns the loss's own, for `Progress`."""

    def restore(self, loss_sums: dict[str, float]) -> None:
        """Receives what `observe` returned after the last step of a resumed run."""


@dataclass(slots=True, kw_only=True)
class Session:
    """One training run."""

    folder: RunFolder
    settings: Settings
    """The resolved configuration, for config.yaml and trackers."""
    model: ModelConfig
    options: OptimizationConfig
    engine: Engine
    objective: Objective
    plan: BatchPlan
    tokenizer: PreTrainedTokenizerBase
    description: str
    """The training data, for people."""
    guard: Guard
    evaluate: Callable[["Session"], Evaluation] | None = None
    """Of the current policy on held-out data, with `score_only`; None without held-out data."""
    moving_reference: MovingReference | None = None
    """What moves the reference; None where it stays."""
    card: Callable[[dict[str, float]], str] = lambda results: ""
    """The model card, given the last evaluation."""
    fingerprints: dict[str, str] = field(default_factory=dict)
    """Name -> digest of data and model; for the checkpoints."""
    checkpoint: Path | None = None
    """What the run resumes from."""
    resharded: bool = False
    """Whether another number of ranks wrote it."""
    progress: Progress = field(default_factory=Progress)
    evaluated: dict[str, float] = field(default_factory=dict)
    """The last evaluation of this process."""
    saves_in_background: bool = False
    """Whether training goes on while a checkpoint is written."""
    pending: PendingCheckpoint | None = None
    """The checkpoint that is being written while training goes on."""
    last: PendingCheckpoint | None = None
    """The last one that was finished, which may still be removing what it made obsolete."""
    mirror: Mirror | None = field(init=False, default=None)
    """The copy of the run folder; on the main process."""
    monitor: Monitor = field(init=False)
    group_flops: npt.NDArray[np.float64] | None = field(init=False)
    """(G,) operations of each group's forward and backward pass; None where they cannot be counted."""
    peak_flops: float | None = field(init=False)
    """Operations per second that one device can do at most, or None where that is not known."""

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Loads the checkpoint and opens the records; within the block the loop may run."""
        torch.manual_seed(self.options.seed)  # for models that draw; ours have no dropout
        self.progress = self._load()
        self.objective.restore(self.progress.loss_sums)
        if self.moving_reference is not None:
            self.moving_reference.restore(self.progress)
        if distributed.is_main():
            self.folder.claim(dict(self.settings.values))
            self.folder.describe(world_size=distributed.world_size(), engine=self.engine.description)
            if self.checkpoint and self.options.resume != "auto":
                self._keep_newer_checkpoints()
            if self.options.checkpoint_every:
                prepare_checkpoints(self.folder, resumed=self.checkpoint is not None)
            if self.options.mirror is not None:
                self.mirror = Mirror(self.options.mirror, self.folder)
        self.saves_in_background = self._saves_in_background()
        self.group_flops, self.peak_flops = self._flops()
        settings = flat(self.settings.values)
        trackers = open_trackers(
            self.options.trackers,
            self.folder.path,
            settings,
            self.folder.identity,
            resumed=self.progress.step > 0,
        )
        self.monitor = Monitor(
            self.folder,
            num_steps=self.plan.num_steps,
            first_step=self.progress.step,
            evaluated=self.progress.evaluated_step == self.progress.step,
            unit=self.objective.unit,
            trackers=trackers,
        )
        with self.monitor:
            terminal.note(f"{self.engine.description}; {self._parameters()}; {self.description}")
            if self.checkpoint:
                terminal.note(f"resuming after step {self.progress.step}, from {self.checkpoint}")
            self.monitor.text("config", f"```yaml\n{settings_text(dict(self.settings.values))}```")
            try:
                yield
            finally:
                for checkpoint in (self.pending, self.last):
                    if checkpoint is not None:
                        checkpoint.settle()

    def score_only(self, batch: TreeBatch, *, per_token: bool = False, aligned: bool = False) -> Tensor:
        """`Engine.score_only` for evaluations. All ranks must call it.

        Raises:
            StopRequestedError: A rank has been asked to stop.
        """
        self.guard.may_continue("evaluation")
        return self.engine.score_only(batch, per_token=per_token, aligned=aligned)

    def move_reference(self) -> None:
        """Makes the policy the reference of the steps that follow. All ranks must call it.

        Raises:
            StopRequestedError: A rank has been asked to stop.
            UserError: The model or the cache could not be written.
        """
        assert self.moving_reference is not None
        self.moving_reference.update(self.progress, self.engine, self.export, self.guard.may_continue)

    def finish_checkpoint(self) -> None:
        """Waits for the checkpoint that is being written, if there is one. All ranks must call it.

        Raises:
            UserError: A rank could not write it.
        """
        pending, self.pending = self.pending, None
        if pending is not None:
            if self.last is not None:
                self.last.settle()
            self.last = pending
            if self.mirror is not None:
                self.mirror.wait()  # publishing removes older checkpoints
            pending.finish()
            if self.mirror is not None:
                self.mirror.send()

    def finish_mirror(self) -> None:
        """Copies what is new in the run folder, the model above all, and waits for it."""
        if self.mirror is not None:
            self.mirror.send()
            self.mirror.wait()

    def export(self, target: Path, kind: ModelConfig | None = None) -> None:
        """Writes the current weights as a model that transformers loads. All ranks must call it.

        Args:
            target: The folder.
            kind: Says what is written of a model with an adapter. Default: as the run's model says.

        Raises:
            UserError: There is no room for it.
        """
        alive.step(f"writing {target.name}")
        weights, card, kind = self.engine.weights(), self.card(self.evaluated), kind or self.model

        def write() -> None:
            try:
                with self.engine.unsharded():
                    export_trained(kind, self.engine.model, weights, self.tokenizer, target, card)
            except (OSError, SafetensorError) as error:
                raise UserError(
                    f"{target}: the model could not be written ({error}): make room, and run the same "
                    "command again to resume from the newest checkpoint"
                ) from error

        distributed.on_main(write)

    def describe(self, groups: list[int]) -> str:
        """These groups of the training data, for people."""
        dataset = self.objective.dataset
        prompts = (self.tokenizer.decode(dataset[group].prompt) for group in groups[:GROUPS_SHOWN])
        shown = [
            f"{group} ({text[:PROMPT_CHARACTERS]!r})" for group, text in zip(groups, prompts, strict=False)
        ]
        more = f" and {len(groups) - GROUPS_SHOWN} more" if len(groups) > GROUPS_SHOWN else ""
        return f"data.train groups {', '.join(shown)}{more}"

    def _load(self) -> Progress:
        if self.checkpoint is None:
            if self.options.dither_masters:
                self.engine.dither(self.options.seed)
            return Progress()
        if not self.resharded:
            return load_checkpoint(self.engine, self.checkpoint, self.checkpoint)
        terminal.note(f"converting {self.checkpoint} for {distributed.world_size()} rank(s)")
        with universal_form(self.checkpoint, self.folder.path) as state:
            return load_checkpoint(self.engine, self.checkpoint, state)

    def _keep_newer_checkpoints(self) -> None:
        if kept := ", ".join(path.name for path in set_aside_newer(self.folder, self.progress.step)):
            terminal.warning(
                f"train.resume: {self.checkpoint} is older than other checkpoints of this run, kept "
                f"beside it as {kept}; delete those that you do not need"
            )

    def _saves_in_background(self) -> bool:
        """The option, or whether the copy fits; all ranks must call it."""
        if self.options.checkpoint_async is not None:
            return self.options.checkpoint_async
        sharded = self.engine.kind.startswith("DeepSpeed")
        trained = self.engine.num_parameters - self.engine.num_frozen
        size = checkpoint_bytes(trained, DTYPES[self.model.dtype], self.options, sharded=sharded)
        return not distributed.any_rank(not fits_memory(here(size, sharded=sharded)))

    def _parameters(self) -> str:
        whole, frozen = self.engine.num_parameters, self.engine.num_frozen
        adapter = f", {(whole - frozen) / 1e6:.2f}M of them trained, in an adapter" if self.model.lora else ""
        return f"{whole / 1e6:.1f}M parameters{adapter}"

    def _flops(self) -> tuple[npt.NDArray[np.float64] | None, float | None]:
        try:
            work = work_of(self.engine.model)
        except Exception as error:  # a config may raise anything, and a metric stops no run
            terminal.note(f"perf/mfu is not recorded: {type(error).__name__}: {first_line(error)}")
            return None, None
        passes = 2 if self.model.lora else 3  # the backward pass is two, one less for frozen weights
        peak = self.options.peak_tflops and self.options.peak_tflops * 1e12
        if peak is None and self.engine.device.type == "cuda" and self.model.dtype == "bfloat16":
            peak = known_peak(torch.cuda.get_device_name())
        return passes * forward_flops(self.objective.dataset, work), peak
