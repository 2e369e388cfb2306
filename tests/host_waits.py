"""Makes visible where the host would wait for a GPU, on a machine without one."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class NoCopiesToDevice(TorchDispatchMode):
    """Raises where a tensor of the host would be copied to the device, which waits unless it is pinned.

    The *meta* device stands for the GPU; there, reading a value (`item`, `tolist`, a branch) and results
    whose size depends on values (`nonzero`, `unique`, boolean indices) raise by themselves.
    """

    def __enter__(self) -> "NoCopiesToDevice":
        self._constants = _NoConstants()
        self._constants.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._constants.__exit__(*raised)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        from_host = [leaf for leaf in tree_leaves((args, kwargs)) if _is_on(leaf, "cpu")]
        copies = "copy" in str(func) or any(leaf.dim() for leaf in from_host)
        if from_host and copies and _on_device(result):
            raise AssertionError(f"{func} copies a tensor of the host to the device")
        return result


class _NoConstants(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and _on_device(result):
            raise AssertionError(f"{func.__name__} copies a number of the host to the device")
        return result


def _is_on(leaf: Any, device: str) -> bool:
    return isinstance(leaf, Tensor) and leaf.device.type == device


def _on_device(result: Any) -> bool:
    return any(_is_on(leaf, "meta") for leaf in tree_leaves(result))
