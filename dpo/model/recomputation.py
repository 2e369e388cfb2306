"""Activations that the backward pass computes again instead of keeping them: none, all of a block's, or most.

Selective recomputation (in the sense of arXiv 2205.05198) keeps what a block's attention has computed, its
matrix products and its kernel, and computes the rest again: norms, activation functions, feed-forward layers.
"""

from functools import partial
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

Recomputed = bool | Literal["full", "selective"]
"""Of `model.gradient_checkpointing`; true is full."""
KEPT = {
    "aten": ("mm", "addmm", "_scaled_dot_product_"),
    "bitsandbytes": ("gemm_4bit",),
}
"""Namespace of operations -> starts of the names of those that attention keeps. FlexAttention, which is
compiled, is not seen and is computed again."""


def recompute(model: PreTrainedModel, kind: Recomputed) -> None:
    """Sets a model up to compute activations of its blocks again; no gradient changes.

    Args:
        model: Of a class that transformers can checkpoint; changed in place.
        kind: Which activations.
    """
    if not kind:
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "selective":
        policy = _KeepAttention(model)
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    model.activation_checkpointing_enable(options)


def recomputed_share(model: PreTrainedModel, kind: Recomputed) -> float:
    """Part of the forward pass that runs twice, by the weights of the blocks' attention and of the rest.

    Args:
        model: On any device.
        kind: Which activations are computed again.
    """
    if kind != "selective":
        return float(bool(kind))
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    kept = {weight for module in _attention(blocks) for weight in module.parameters()}
    whole = sum(weight.numel() for weight in blocks.parameters())
    return 1 - sum(weight.numel() for weight in kept) / whole


class _KeepAttention:
    """The policy of torch's selective checkpoints: keep what is computed inside of attention."""

    def __init__(self, model: nn.Module) -> None:
        self._depth = 0
        for module in _attention(model):
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, always_call=True)  # recomputing stops early

    def __call__(self, context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        names = KEPT.get(getattr(operation, "namespace", ""), ())
        if self._depth and operation.name().partition("::")[2].startswith(names):
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1


def _attention(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "attention" in type(module).__name__.lower()]
