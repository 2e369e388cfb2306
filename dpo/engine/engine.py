"""The policy and its optimizer on ZeRO, replicas or one device, behind three calls for the loop.

`Engine` scores a batch, accumulates a gradient and updates the weights. No other package knows Accelerate and
DeepSpeed; `dpo.engine.frozen` is the same for models that only score.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo import distributed
from dpo.config import ModelConfig, OptimizationConfig
from dpo.data.trees import Layout, TreeBatch
from dpo.engine.deepspeed_config import compile_for_host, set_ours, without_waiting
from dpo.engine.deepspeed_model import fit_buckets, refuse_rounding
from dpo.engine.dither import dither_replicas, dither_shards
from dpo.engine.masters import Masters
from dpo.engine.optimizer import check_optimizer, load_state, make_optimizer, set_learning_rate
from dpo.engine.scoring import gathered, make_scorer, not_of_text, register_head, settle_layout
from dpo.engine.sharded_state import is_part, load_sharded, save_sharded
from dpo.engine.snapshot import Snapshots
from dpo.engine.world import kind_here, unsharded
from dpo.errors import UserError
from dpo.model.authors import kept_in_float32
from dpo.model.load import DTYPES
from dpo.model.offload import Offload, offload
from dpo.model.probe import Probed
from dpo.model.probe_trees import ProbeTrees
from dpo.model.quantized import num_elements
from dpo.model.recomputation import learning, recompute
from dpo.model.routers import Routers
from dpo.model.scorer import SequenceScorer


class Engine:
    """A policy and its optimizer, wrapped for this world."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: PreTrainedModel,
        config: ModelConfig,
        options: OptimizationConfig,
        *,
        universal: bool = False,
    ) -> None:
        """Wraps the model; from here on only the engine touches it.

        Args:
            accelerator: From `start`.
            model: The loaded policy; weights that need no gradient are not changed and not saved.
            config: Its compute type and gradient checkpointing.
            options: Optimizer and clipping.
            universal: `load` will be given the universal form of a state from another number of ranks.

        Raises:
            UserError: FlexAttention on a CPU, an optimizer or type that cannot be here, or routers without
                a balancing loss.
        """
        if config.attention == "flex" and not torch.cuda.is_available():
            raise UserError("model.attention: flex; it has no backward pass on CPUs: set auto or sdpa")
        self._zero = accelerator.distributed_type == DistributedType.DEEPSPEED
        settings = accelerator.deepspeed_plugin.deepspeed_config if self._zero else None
        check_optimizer(options, settings)
        self._accelerator = accelerator
        self._dtype = DTYPES[config.dtype]
        self._has_adapter = config.lora is not None  # authors freeze weights, too
        self._max_grad_norm = options.max_grad_norm
        self._copies = Snapshots()
        recompute(model, config.gradient_checkpointing)
        if config.offload_activations:
            offload(model, Offload(model))
        self.routers = Routers(model, balanced=config.router_aux_loss_weight > 0)
        learning(model)
        scorer = make_scorer(model, config)
        self._scorer: Any  # ours, or DeepSpeed's engine around it
        self.num_parameters = num_elements(model.parameters())
        self.num_frozen = num_elements(p for p in model.parameters() if not p.requires_grad)
        named = scorer.named_parameters(remove_duplicate=False)  # tied weights have two names
        self._frozen = {name for name, parameter in named if not parameter.requires_grad}
        ratio = config.lora.learning_rate_ratio if config.lora is not None else 1.0
        if settings is None:
            unreached, named = set(not_of_text(scorer)), scorer.to(accelerator.device).named_parameters()
            self._masters = Masters([w for name, w in named if w.requires_grad and name not in unreached])
            optimizer = make_optimizer(scorer, options, zero_half_ratio=ratio, updated=self._masters.of)
            self._scorer, self._optimizer = scorer, accelerator.prepare(optimizer)
            return
        refuse_rounding(model, self._dtype, "start without DeepSpeed")
        fit_buckets(settings, model)
        set_ours(settings, max_grad_norm=options.max_grad_norm, universal=universal)
        without_waiting(settings)
        compile_for_host(settings)
        optimizer = make_optimizer(scorer, options, zero_half_ratio=ratio)
        self._scorer, self._optimizer = accelerator.prepare(scorer, optimizer)
        if self._stage == 3:
            register_head(scorer)

    def settle_layout(self, trees: ProbeTrees) -> Probed:
        """Finds out how this model can share prompts; see `dpo.engine.scoring`. All ranks must call it."""
        return settle_layout(self._scorer, trees, self._dtype)

    @property
    def layout(self) -> Layout:
        """The layout of batches for this policy."""
        scorer: SequenceScorer = self._accelerator.unwrap_model(self._scorer)
        return scorer.layout

    @property
    def windows(self) -> list[int | None]:
        """How far back the policy's layers look; see `TreeBatch.to`."""
        scorer: SequenceScorer = self._accelerator.unwrap_model(self._scorer)
        return scorer.windows

    @property
    def device(self) -> torch.device:
        """The device of batches."""
        return torch.device(self._accelerator.device)

    @property
    def kind(self) -> str:
        """How the policy is sharded; see `kind_here`."""
        return kind_here()

    @property
    def description(self) -> str:
        """Engine, world and compute type, for people."""
        dtype = str(self._dtype).removeprefix("torch.")
        return f"{self.kind}, {distributed.world_size()} rank(s), {self.device.type}, {dtype}"

    @property
    def _stage(self) -> int:
        return int(self._accelerator.deepspeed_plugin.zero_stage)

    def score(self, batch: TreeBatch, *, per_token: bool = False, aligned: bool = False) -> Tensor:
        """(S,) float64 log-probs of the batch's completions under the policy; see
        `SequenceScorer.forward`.

        Args:
            batch: What to score.
            per_token: Give (N,) float32 log-probs of the completion tokens instead.
            aligned: Give (S, 2), the second column aligned to samples of the policy.
        """
        logps: Tensor = self._scorer(batch, per_token=per_token, aligned=aligned)
        return logps

    @torch.no_grad()
    def score_only(self, batch: TreeBatch, *, per_token: bool = False, aligned: bool = False) -> Tensor:
        """`score` without gradients. Every rank must make the same number of calls."""
        return self.score(batch, per_token=per_token, aligned=aligned)

    def accumulate(self, loss: Tensor, *, last: bool) -> None:
        """Adds a micro-batch's gradient to the step's.

        Args:
            loss: This micro-batch's part of the step's loss, divided by the step's global count: the parts of
                all ranks and micro-batches add up to the step's loss.
            last: Whether it is the step's last micro-batch. Every rank must make the same number of calls.
        """
        # A loss that is not finite must not give a finite gradient: `update` looks at the gradient alone.
        valid = torch.where(loss.detach().isfinite(), 1.0, torch.nan)
        if not self._zero:
            self._masters.backward(loss * valid, last=last)
            return
        self._scorer.set_gradient_accumulation_boundary(last)
        self._scorer.backward(loss * valid * distributed.world_size())  # DeepSpeed averages over ranks
        if not last:
            self._scorer.step()  # counts the micro-batch; weights change at the boundary only

    def update(self, learning_rate: float) -> float:
        """One optimizer step with the accumulated gradient.

        Returns:
            The global gradient norm before clipping. If it is not finite, nothing is changed.
        """
        set_learning_rate(self._optimizer, learning_rate)
        if self._zero and self._stage > 0:
            self._scorer.step()  # skips the update itself, and reports an infinite norm or -1
            reported = float(self._scorer.get_global_grad_norm())
            return reported if reported >= 0 else math.inf
        updated = self._scorer.parameters() if self._zero else self._masters.of.values()
        parameters = [p for p in updated if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._zero:
            self._scorer.step() if norm.isfinite() else self._scorer.zero_grad()
            return float(norm)
        if norm.isfinite():
            if self._max_grad_norm:
                nn.utils.clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
            self._optimizer.step()
            self._masters.round()
        self._masters.zero_gradients()
        return float(norm)

    def dither(self, seed: int) -> None:
        """Starts masters of bfloat16 weights between bfloat16 values; see `dpo.engine.dither`."""
        bare = self._accelerator.unwrap_model(self._scorer)
        if self._zero:
            dither_shards(bare, seed)
        else:
            dither_replicas(self._masters, bare, seed)

    def weights(self) -> dict[str, Tensor]:
        """The policy's full state dict in its compute type, on the main rank. All ranks must call it.

        What its authors keep in float32 stays that.

        Of a frozen base with an adapter only the adapter, in float32.
        """
        if self._has_adapter:
            return self._trained_weights()
        weights = self._accelerator.get_state_dict(self._scorer)
        if not distributed.is_main():
            return {}
        found = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        wide = kept_in_float32(self.model, found)
        for name, tensor in found.items():
            if tensor.is_floating_point():
                dtype = torch.float32 if name in wide else self._dtype
                found[name] = tensor.detach().to("cpu", dtype)
        return found

    def _trained_weights(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            with gathered([parameter]):
                if distributed.is_main():
                    found[name] = parameter.detach().to("cpu", torch.float32, copy=True)
        return found

    def unsharded(self) -> AbstractContextManager[None]:
        """See `unsharded`."""
        return unsharded(self._accelerator)

    @property
    def model(self) -> PreTrainedModel:
        """The bare policy, for its config and `save_pretrained`."""
        scorer: SequenceScorer = self._accelerator.unwrap_model(self._scorer)
        return scorer.model

    @property
    def is_sharded(self) -> bool:
        """Whether the weights are sharded, so that all ranks must take part in every forward pass."""
        return self._zero and self._stage == 3 and distributed.is_distributed()

    @contextmanager
    def sampling_model(self) -> Iterator[PreTrainedModel]:
        """The bare policy, ready to generate: in evaluation mode, with its key-value cache."""
        self.model.eval()  # in training mode checkpointed blocks would ignore that cache
        try:
            yield self.model
        finally:
            learning(self.model)

    def save(self, folder: Path, *, copied: bool = False) -> Callable[[], list[Path]]:
        """Takes what is trained, and the optimizer's state. All ranks must call it.

        Args:
            folder: Where the files go.
            copied: Whether training may go on before they are written; then no earlier copy may be in use.

        Returns:
            A function that writes this rank's files and returns them; it raises OSError or RuntimeError, and
            may run in a thread.
        """
        states: list[tuple[Path, Any]] = []
        if self._zero:
            states = save_sharded(self._scorer, folder, self._frozen, self._copies if copied else None)
        elif distributed.is_main():
            bare = self._accelerator.unwrap_model(self._scorer)
            state = {
                "model": self._without_frozen(bare.state_dict()) | dict(self._masters.named(bare)),
                "optimizer": self._optimizer.state_dict(),
            }
            states = [(folder / "engine.pt", self._copies.take("engine", state) if copied else state)]

        def write() -> list[Path]:
            for file, state in states:
                torch.save(state, file)
            return [file for file, _ in states]

        return write

    def load(self, folder: Path) -> None:
        """Reads what `save` wrote, on the same number of ranks and with the same engine."""
        if self._zero:
            load_sharded(self._scorer, folder, self._load_trained if self._frozen else None)
            return
        state = torch.load(folder / "engine.pt", map_location="cpu", weights_only=True)
        bare = self._accelerator.unwrap_model(self._scorer)
        self._load_trained(state["model"], bare)
        with torch.no_grad():
            for name, master in self._masters.named(bare):
                master.copy_(state["model"][name])
        load_state(self._optimizer, state["optimizer"])

    def _without_frozen(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: weight for name, weight in weights.items() if not is_part(name, self._frozen)}

    def _load_trained(self, src: dict[str, Tensor], dst: nn.Module) -> None:  # DeepSpeed's names
        """Loads weights into a module that has its frozen ones; RuntimeError if any other is missing."""
        outcome = dst.load_state_dict(src, strict=False)
        wrong = [*(set(outcome.missing_keys) - self._frozen), *outcome.unexpected_keys]
        if wrong:
            raise RuntimeError(f"the checkpoint does not hold what is trained: {sorted(wrong)[0]}")
