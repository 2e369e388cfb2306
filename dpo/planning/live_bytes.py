"""Counts the bytes of all live tensors: every storage once, however many views it has.

The measuring tool of `rehearsal`, and of the benchmarks that check it.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operations allocate while it is active, until they are freed.

    Exact also where an allocator has no statistics, as on CPUs, and for FakeTensors, which allocate nothing.
    Memory without a tensor (workspaces of libraries, fragmentation) is not counted.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        """Starts at zero.

        Args:
            known: Existing tensors, which do not count.
        """
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = 0
        """Bytes alive."""
        self.peak = 0
        """Most bytes alive at once."""
        self.operations = 0
        """Operations so far, without views: what a GPU's host would launch."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation and counts it, and new storages in its results."""
        result = func(*args, **(kwargs or {}))
        self.operations += func.namespace == "aten" and not func.is_view
        self.count(value for value in tree_leaves(result) if isinstance(value, Tensor))
        return result

    def count(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that no operation allocated, such as weights mapped from a file."""
        for tensor in tensors:
            if tensor.layout == torch.strided and tensor.device.type != "meta":
                self._count(tensor.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._sizes:
            return
        self._sizes[key] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
