"""Activations that wait for the backward pass in the host's memory (`model.offload_activations`).

What the trunk saves for its backward pass is copied to the host when it is saved, and back when it is needed;
no value changes. With recomputed activations those are the inputs of the blocks.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from dpo.model.scorer import trunk_of

LEAST_BYTES = 1 << 16
"""Smaller tensors stay: a copy of their own would cost more than they take."""


class Offload:
    """Moves what a model saves for its backward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._weights: set[int] = set()
        self.bytes = 0
        """Of all tensors that were moved to the host so far."""

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, whose activations are moved."""

        @wraps(forward)
        def moving(*arguments: Any, **options: Any) -> Any:
            held = (*self._model.parameters(), *self._model.buffers())
            self._weights = {tensor.untyped_storage()._cdata for tensor in held}
            with saved_tensors_hooks(self._pack, self._unpack):
                return forward(*arguments, **options)

        return moving

    def to_host(self, tensor: Tensor) -> Any:
        """The tensor as it waits: a copy, in memory that a GPU can read by itself."""
        on_gpu = tensor.device.type == "cuda"
        copy = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu)
        return tensor.device, copy.copy_(tensor, non_blocking=on_gpu)

    def from_host(self, waiting: Any) -> Tensor:
        """The tensor, on its device again."""
        device, copy = waiting
        back: Tensor = copy.to(device, non_blocking=True)
        return back

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        repeats = storage.nbytes() < tensor.nbytes  # an expanded one, which a copy would write out
        if tensor.nbytes < LEAST_BYTES or repeats or storage._cdata in self._weights:
            return tensor
        self.bytes += tensor.nbytes
        return self.to_host(tensor)

    def _unpack(self, packed: Any) -> Tensor:
        return packed if isinstance(packed, Tensor) else self.from_host(packed)


def offload(model: PreTrainedModel, offloading: Offload) -> None:
    """Moves the activations of a model's trunk; changed in place.

    Args:
        model: Whose trunk is known, or whose whole pass is moved.
        offloading: What moves them.
    """
    trunk = trunk_of(model) or model
    trunk.forward = offloading.around(trunk.forward)
