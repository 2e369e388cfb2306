"""Matrix products without their work, for tests of memory, in which no value matters.

A CPU without instructions for bfloat16 takes ten times as long for them as in float32.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ATEN = torch.ops.aten
FACTORS = {ATEN.mm.default: 0, ATEN.bmm.default: 0, ATEN.addmm.default: 1}
"""Operation -> index of the first of the two factors among its arguments."""


class ProductsAreZero(TorchDispatchMode):
    """Allocates the result of every matrix product, as the product does, and computes nothing."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation, or gives zeros in its place."""
        if func not in FACTORS:
            return func(*args, **(kwargs or {}))
        left, right = args[FACTORS[func] :][:2]
        return left.new_zeros(*left.shape[:-1], right.shape[-1])
