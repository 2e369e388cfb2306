"""The one place that knows Accelerate and DeepSpeed.

`start` joins the launcher's world; `Engine` holds the policy and its optimizer and offers the loop three
calls: score a batch, accumulate a gradient, update the weights. The same loop so runs on ZeRO, on DDP and on
one device. `frozen_scorer` is a model that only scores, in replicas or sharded.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, KwargsHandler
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import HfDeepSpeedConfig

from dpo import distributed
from dpo.config import ModelConfig, OptimizationConfig
from dpo.data.batches import RowBatch
from dpo.model.load import DTYPES, load_model, num_parameters
from dpo.model.logprobs import SequenceScorer

ENGINE_TAG = "engine"
RMSPROP_SMOOTHING = 0.99


def start(model: ModelConfig) -> Accelerator:
    """The Accelerator of this process; to be made before the model is loaded, so that ZeRO-3 can shard it
    then.

    Without an accelerator the gloo backend must be named, or Accelerate believes that every rank is alone.
    """
    distributed.start()
    backend = None if torch.cuda.is_available() else "gloo"
    handlers: list[KwargsHandler] = []
    if distributed.is_distributed():
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=distributed.COLLECTIVE_TIMEOUT))
    mixed_precision = "bf16" if model.dtype == "bfloat16" else "no"
    return Accelerator(mixed_precision=mixed_precision, kwargs_handlers=handlers)


def weight_dtype(accelerator: Accelerator, model: ModelConfig) -> torch.dtype:
    """Type in which the policy is loaded: DeepSpeed keeps float32 masters of its own, elsewhere the weights
    are them.
    """
    return DTYPES[model.dtype] if accelerator.distributed_type == DistributedType.DEEPSPEED else torch.float32


class Engine:
    """A policy and its optimizer, wrapped for this world."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: PreTrainedModel,
        config: ModelConfig,
        options: OptimizationConfig,
    ) -> None:
        """Wraps the model; from here on only the engine touches it.

        Args:
            accelerator: From `start`.
            model: The loaded policy.
            config: Its compute type and gradient checkpointing.
            options: Optimizer and clipping.
        """
        self._accelerator = accelerator
        self._dtype = DTYPES[config.dtype]
        self._max_grad_norm = options.max_grad_norm
        self._zero = accelerator.distributed_type == DistributedType.DEEPSPEED
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()  # dropout is 0 everywhere; gradient checkpointing runs in training mode only
        scorer = SequenceScorer(model)
        self.num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        optimizer = make_optimizer(scorer, options)
        if self._zero:
            plugin = accelerator.deepspeed_plugin
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # tokens size our micro-batches
            plugin.deepspeed_config["gradient_clipping"] = options.max_grad_norm
        self._scorer, self._optimizer = accelerator.prepare(scorer, optimizer)

    @property
    def device(self) -> torch.device:
        """Where batches belong."""
        return torch.device(self._accelerator.device)

    @property
    def kind(self) -> str:
        """How the policy is sharded: `DeepSpeed ZeRO-2`, `DDP` or `one device`."""
        if self._zero:
            return f"DeepSpeed ZeRO-{self._stage}"
        return "DDP" if distributed.is_distributed() else "one device"

    @property
    def description(self) -> str:
        """Engine, world and compute type, for people."""
        dtype = str(self._dtype).removeprefix("torch.")
        return f"{self.kind}, {distributed.world_size()} rank(s), {self.device.type}, {dtype}"

    @property
    def _stage(self) -> int:
        return int(self._accelerator.deepspeed_plugin.zero_stage)

    def score(self, batch: RowBatch) -> Tensor:
        """(S,) float64 log-probs of the batch's completions under the policy; see
        `SequenceScorer.forward`.
        """
        logps: Tensor = self._scorer(batch)
        return logps

    @torch.no_grad()
    def score_only(self, batch: RowBatch) -> Tensor:
        """`score` without gradients. Every rank must make the same number of calls."""
        return self.score(batch)

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """Adds a micro-batch's gradient to the step's.

        Args:
            loss: This micro-batch's part of the step's loss, already divided by the step's global count, so
                that the parts of all ranks and micro-batches add up to it.
            last: Whether it is the step's last micro-batch. Every rank must make the same number of calls.
        """
        scaled = loss * distributed.world_size()  # DeepSpeed and DDP average over ranks
        if self._zero:
            self._scorer.set_gradient_accumulation_boundary(last)
            self._scorer.backward(scaled)
            if not last:
                self._scorer.step()  # counts the micro-batch; weights change at the boundary only
        elif last or not distributed.is_distributed():
            self._accelerator.backward(scaled)
        else:
            with self._accelerator.no_sync(self._scorer):
                self._accelerator.backward(scaled)

    def update(self, learning_rate: float) -> float:
        """One optimizer step with the accumulated gradient; returns its global norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        if self._zero:
            before = self._local_norm() if self._stage == 0 else None  # stage 0 in fp32 reports none
            self._scorer.step()
            reported = self._scorer.get_global_grad_norm()
            return float(before if before is not None else reported)
        limit = self._max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(self._scorer.parameters(), limit)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)

    def _local_norm(self) -> float:
        return float(
            nn.utils.get_total_norm([p.grad for p in self._scorer.parameters() if p.grad is not None])
        )

    def weights(self) -> dict[str, Tensor]:
        """The policy's full state dict in its compute type, on the main rank. All ranks must call it."""
        gathered = self._accelerator.get_state_dict(self._scorer)
        if not distributed.is_main():
            return {}
        prefix = "model."
        return {
            name.removeprefix(prefix): tensor.detach().to("cpu", self._dtype)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in gathered.items()
        }

    @property
    def model(self) -> PreTrainedModel:
        """The bare policy, for its config and `save_pretrained`."""
        scorer: SequenceScorer = self._accelerator.unwrap_model(self._scorer)
        return scorer.model

    def save(self, folder: Path) -> None:
        """Writes weights and optimizer state into `folder`. All ranks must call it."""
        if self._zero:
            self._scorer.save_checkpoint(str(folder), tag=ENGINE_TAG)
        elif distributed.is_main():
            bare = self._accelerator.unwrap_model(self._scorer)
            torch.save(
                {"model": bare.state_dict(), "optimizer": self._optimizer.state_dict()}, folder / "engine.pt"
            )

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, on the same number of ranks and with the same engine."""
        if self._zero:
            loaded, _ = self._scorer.load_checkpoint(str(folder), tag=ENGINE_TAG)
            if loaded is None:
                raise RuntimeError(f"{folder}: DeepSpeed found no checkpoint to load")
            return
        state = torch.load(folder / "engine.pt", map_location=self.device, weights_only=True)
        self._accelerator.unwrap_model(self._scorer).load_state_dict(state["model"])
        self._optimizer.load_state_dict(state["optimizer"])


@contextmanager
def frozen_scorer(model: ModelConfig, *, sharded: bool) -> Iterator[nn.Module]:
    """A model that only scores, as a `SequenceScorer` on this process's device; freed at the end of the
    block.

    Args:
        model: Which model, and its compute type.
        sharded: Spread its weights over all ranks with ZeRO-3, also while they load; every rank must then
        make
            the same number of calls. Otherwise each rank holds a replica.
    """
    if not sharded:
        yield SequenceScorer(load_model(model)).to(distributed.device()).eval()
    else:
        import deepspeed  # here, because it looks for compilers and devices, and says so, when it is imported

        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": model.dtype == "bfloat16"},
        }
        sharding = HfDeepSpeedConfig(settings)  # from_pretrained shards while this object lives
        scorer = SequenceScorer(load_model(model))
        del sharding
        sharded_scorer, *_ = deepspeed.initialize(model=scorer, config=settings)
        sharded_scorer.eval()
        try:
            yield sharded_scorer
        finally:
            sharded_scorer.destroy()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fits_one_device(model: ModelConfig) -> bool:
    """Whether the weights take at most half of a device's memory, so that every rank can hold a replica.

    On a CPU the ranks of a node share its memory.
    """
    needed = num_parameters(model) * DTYPES[model.dtype].itemsize
    if torch.cuda.is_available():
        return needed <= torch.cuda.mem_get_info()[1] / 2
    node = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return needed <= node / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / 2


def make_optimizer(module: nn.Module, options: OptimizationConfig) -> torch.optim.Optimizer:
    """AdamW or RMSprop over the module's parameters; weight decay on matrices only."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) >= 2]
    others = [p for p in parameters if len(getattr(p, "ds_shape", p.shape)) < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if options.optimizer == "rmsprop":
        return torch.optim.RMSprop(groups, lr=options.learning_rate, alpha=RMSPROP_SMOOTHING)
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.adam_betas)


def learning_rate(step: int, num_steps: int, options: OptimizationConfig) -> float:
    """The learning rate of an optimizer step: linear warm-up, then the schedule.

    Args:
        step: From 1 to num_steps.
        num_steps: Optimizer steps of the run.
        options: Peak, schedule and warm-up; the warm-up is at most a tenth of the run.
    """
    warmup = min(options.warmup_steps, num_steps // 10)
    if step <= warmup:
        return options.learning_rate * step / warmup
    done = (step - warmup - 1) / max(1, num_steps - warmup)
    if options.schedule == "linear":
        return options.learning_rate * (1 - done)
    if options.schedule == "cosine":
        return options.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
    return options.learning_rate
