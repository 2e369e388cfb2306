"""Activations that the backward pass computes again instead of keeping them: none, all of a block's, or most.

Selective recomputation (in the sense of arXiv 2205.05198) keeps what a block's attention has computed, its
matrix products and its kernel, and computes the rest again: norms, activation functions, feed-forward layers.
"""

from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
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
        options["context_fn"] = _Attention(model).contexts
    model.activation_checkpointing_enable(options)


def learning(model: PreTrainedModel) -> None:
    """Sets what recomputes activations to training mode, and nothing else.

    All other modules stay in evaluation mode: some families draw their experts at random in training (law 0).
    """
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


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


class _Attention:
    """Knows whether the model is computing attention now, and what it keeps of that."""

    def __init__(self, model: nn.Module) -> None:
        self._depth = 0
        for module in _attention(model):
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, always_call=True)  # recomputing stops early

    def keeps(self, operation: Any) -> bool:
        names = KEPT.get(operation.namespace, ())
        return self._depth > 0 and operation.name().partition("::")[2].startswith(names)

    def contexts(self) -> tuple[TorchDispatchMode, TorchDispatchMode]:
        """For `torch.utils.checkpoint`: around the forward pass of a block, and around its repetition."""
        kept = deque[Any]()
        return _Keep(self, kept), _Reuse(self, kept)

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._depth += 1

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._depth -= 1


class _Keep(TorchDispatchMode):
    """Keeps what attention computes, in order.

    torch's own selective checkpoints compare every operation of both passes, so that they fail where the
    second has others, as where ZeRO-3 gathers weights; and they do not see a change in place through a view.
    """

    def __init__(self, attention: _Attention, kept: deque[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self._attention, self._kept, self._storages = attention, kept, set[int]()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """So that compiled FlexAttention stays compiled."""
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation.

        Raises:
            RuntimeError: It changes in place what was kept, which would then not be what was computed.
        """
        if func._schema.is_mutable and self._storages & {*_changed(func, args)}:
            raise RuntimeError(
                "model.gradient_checkpointing: selective; this model changes in place what attention has "
                f"computed ({func.name()}): set full"
            )
        result = func(*args, **(kwargs or {}))
        if self._attention.keeps(func):
            self._kept.append(tree_map_only(Tensor, Tensor.detach, result))
            self._storages |= {_storage(part) for part in tree_leaves(result) if isinstance(part, Tensor)}
        return result


class _Reuse(_Keep):
    """Gives what `_Keep` kept, in the same order, instead of running the operation."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation, unless its result was kept."""
        return self._kept.popleft() if self._attention.keeps(func) else func(*args, **(kwargs or {}))


def _changed(operation: Any, args: tuple[Any, ...]) -> Iterator[int]:
    """The storages that an operation writes to."""
    for argument, value in zip(operation._schema.arguments, args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, Tensor):
            yield _storage(value)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _attention(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "attention" in type(module).__name__.lower()]
