"""A copy of a state dict in the host's memory, which training on does not change.

The memory of one copy is used again for the next: getting new memory takes longer than filling it.
"""

import copy
from typing import Any

import torch
from torch import Tensor

Place = tuple[torch.device, int, torch.Size, tuple[int, ...], torch.dtype]


class Snapshots:
    """Copies of states, each in the memory of the one before that had the same name."""

    def __init__(self) -> None:
        self._memory: dict[str, list[Tensor]] = {}

    def take(self, name: str, state: Any) -> Any:
        """The same mappings, lists and values, with every tensor copied; tensors that are one stay one.

        Args:
            name: What is copied. The last copy of this name is overwritten: nobody may need it any more.
            state: What `torch.save` could write.
        """
        copies = _Copies(self._memory.pop(name, []))
        found = copies.of(state)
        self._memory[name] = copies.used
        return found


class _Copies:
    """One copy in the making."""

    def __init__(self, free: list[Tensor]) -> None:
        self._free, self._made = free, dict[Place, Tensor]()
        self.used: list[Tensor] = []

    def of(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._of_tensor(value.detach())
        if isinstance(value, dict):
            same = copy.copy(value)  # keeps the class, and the attributes of a module's state
            for key, item in value.items():
                same[key] = self.of(item)
            return same
        if isinstance(value, torch.Size):
            return value
        if isinstance(value, list | tuple):
            items = [self.of(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        return copy.deepcopy(value)

    def _of_tensor(self, value: Tensor) -> Tensor:
        place = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() == 0 or place not in self._made:
            self._made[place] = self._memory_for(value).copy_(value)
        return self._made[place]

    def _memory_for(self, value: Tensor) -> Tensor:
        """A state has the same tensors each time, so that the next free memory almost always fits."""
        index = len(self.used)
        wanted = torch.empty_like(value, device="meta")
        fits = index < len(self._free) and _layout(self._free[index]) == _layout(wanted)
        # a device copies into pinned memory several times faster
        pinned = value.device.type == "cuda"
        memory = self._free[index] if fits else torch.empty_like(wanted, device="cpu", pin_memory=pinned)
        self.used.append(memory)
        return memory


def _layout(tensor: Tensor) -> tuple[torch.Size, tuple[int, ...], torch.dtype]:
    return tensor.shape, tensor.stride(), tensor.dtype
