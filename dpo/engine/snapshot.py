"""A copy of a state dict in the host's memory, which training on does not change."""

import copy
from typing import Any

import torch
from torch import Tensor

Place = tuple[torch.device, int, torch.Size, tuple[int, ...], torch.dtype]


def snapshot(state: Any) -> Any:
    """The same mappings, lists and values, with every tensor copied; tensors that are one stay one.

    Args:
        state: What `torch.save` could write.
    """
    return _copied(state, {})


def _copied(value: Any, copies: dict[Place, Tensor]) -> Any:
    if isinstance(value, Tensor):
        place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() == 0 or place not in copies:
            copies[place] = value.detach().to("cpu", copy=True)
        return copies[place]
    if isinstance(value, dict):
        same = copy.copy(value)  # keeps the class, and the attributes of a module's state
        for key, item in value.items():
            same[key] = _copied(item, copies)
        return same
    if isinstance(value, torch.Size):
        return value
    if isinstance(value, list | tuple):
        items = [_copied(item, copies) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return copy.deepcopy(value)
