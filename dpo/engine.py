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
from dpo.data.trees import Layout, Tree, TreeBatch
from dpo.errors import UserError
from dpo.model.load import DTYPES, load_model, num_parameters
from dpo.model.logprobs import SequenceScorer
from dpo.model.probe import Probed, probe

ENGINE_TAG = "engine"
RMSPROP_SMOOTHING = 0.99
CPU_TOKENS, GPU_TOKENS = 1024, 16384
"""Of one pass where the config gives none: activations that stay in a CPU's cache, rows that fill a GPU."""


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

        Raises:
            UserError: FlexAttention is asked for where it cannot train.
        """
        if config.attention == "flex" and not torch.cuda.is_available():
            raise UserError(
                "model.attention: flex; FlexAttention has no backward pass on CPUs: set auto or sdpa"
            )
        self._accelerator = accelerator
        self._dtype = DTYPES[config.dtype]
        self._max_grad_norm = options.max_grad_norm
        self._zero = accelerator.distributed_type == DistributedType.DEEPSPEED
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()  # dropout is 0 everywhere; gradient checkpointing runs in training mode only
        scorer = make_scorer(model, config)
        self.num_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        optimizer = make_optimizer(scorer, options)
        if self._zero:
            plugin = accelerator.deepspeed_plugin
            plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1  # tokens size our micro-batches
            plugin.deepspeed_config["gradient_clipping"] = options.max_grad_norm
        self._scorer, self._optimizer = accelerator.prepare(scorer, optimizer)
        if self._zero and self._stage == 3:
            _register_head(scorer)

    def settle_layout(self, longest: Tree) -> Probed:
        """Finds out how this model may share prompts; see `settle_layout`. All ranks must call it."""
        return settle_layout(self._scorer, longest, self._dtype)

    @property
    def layout(self) -> Layout:
        """How batches for this policy are to be laid out."""
        scorer: SequenceScorer = self._accelerator.unwrap_model(self._scorer)
        return scorer.layout

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

    def score(self, batch: TreeBatch) -> Tensor:
        """(S,) float64 log-probs of the batch's completions under the policy; see
        `SequenceScorer.forward`.
        """
        logps: Tensor = self._scorer(batch)
        return logps

    @torch.no_grad()
    def score_only(self, batch: TreeBatch) -> Tensor:
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


def token_budget(given: int | None) -> int:
    """Tokens of one pass: what the config says, or what was measured to be fast on this kind of device."""
    return given or (GPU_TOKENS if torch.cuda.is_available() else CPU_TOKENS)


def make_scorer(model: PreTrainedModel, config: ModelConfig) -> SequenceScorer:
    """The model as a scorer, with the attention that the config asks for."""
    flex = config.attention == "flex" or (config.attention == "auto" and torch.cuda.is_available())
    scorer = SequenceScorer(model, flex=flex)
    if not config.share_prompts:
        scorer.layouts, scorer.layout = ["rows"], "rows"
    return scorer


def settle_layout(scorer: nn.Module, longest: Tree, dtype: torch.dtype) -> Probed:
    """Tries the layouts that a model may take and settles on the first that is exact, alike on all ranks.

    Args:
        scorer: From `make_scorer` or `frozen_scorer`, wrapped or not.
        longest: The longest prompt with completions that it will meet.
        dtype: The compute type.

    Returns:
        The layout, and what was turned down and why.
    """
    bare = scorer if isinstance(scorer, SequenceScorer) else scorer.module
    assert isinstance(bare, SequenceScorer)
    probed = probe(scorer, bare.layouts, longest, dtype=dtype, device=distributed.device())
    probed = distributed.from_main(probed)
    bare.layout, bare.uses_projection = probed.layout, probed.uses_projection
    return probed


def _register_head(scorer: SequenceScorer) -> None:
    """Tells ZeRO-3 that the projection uses the output layer's weights outside that layer."""
    from deepspeed.runtime.zero import register_external_parameter

    for parameter in scorer.projection.head.parameters():
        register_external_parameter(scorer.projection, parameter)


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
        yield make_scorer(load_model(model), model).to(distributed.device()).eval()
    else:
        import deepspeed  # here, because it looks for compilers and devices, and says so, when it is imported

        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "bf16": {"enabled": model.dtype == "bfloat16"},
        }
        sharding = HfDeepSpeedConfig(settings)  # from_pretrained shards while this object lives
        scorer = make_scorer(load_model(model), model)
        del sharding
        sharded_scorer, *_ = deepspeed.initialize(model=scorer, config=settings)
        _register_head(scorer)
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
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=options.adam_betas, fused=True)


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
