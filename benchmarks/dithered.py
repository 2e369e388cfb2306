"""An experiment: training in bfloat16 with masters that do not start on bfloat16 values.

    export OMP_NUM_THREADS=1 ACCELERATE_USE_CPU=true
    python -m torch.distributed.run --nproc_per_node 2 -m benchmarks.dithered train --config FILE ...

With a reference in bfloat16 every float32 master starts on a bfloat16 value, and a weight stays there until
its master has gone half a spacing. Here each master starts at random within that half, uniformly: rounding
still gives the reference's weights, and the first loss is ln 2 as before, but an update moves each weight
with a probability in proportion to it, from the first step on. Without DeepSpeed only.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dpo.cli.main import run
from dpo.engine import masters

SIGNIFICAND_BITS = 8
WITHIN = 0.999
"""Of half a spacing: no master is at a tie."""


def main() -> int:
    """Runs a command of dpo with dithered masters."""
    plain = masters.Masters.__init__

    def dithered(self: masters.Masters, trained: Sequence[nn.Parameter]) -> None:
        plain(self, trained)
        for number, (weight, master) in enumerate(self.of.items()):
            if master is not weight:
                master.data = dither(weight.detach(), seed=number)

    masters.Masters.__init__ = dithered  # type: ignore[method-assign]
    return run(sys.argv[1:])


def dither(weight: Tensor, *, seed: int) -> Tensor:
    """Float32 values that are uniform around bfloat16 ones and round to them.

    Args:
        weight: bfloat16, on the CPU.
        seed: Of the draw.
    """
    values = weight.float()
    _, exponent = torch.frexp(values)
    spacing = torch.ldexp(torch.ones_like(values), exponent - SIGNIFICAND_BITS)
    uniform = torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)) - 0.5
    moved = values + WITHIN * uniform * spacing
    return torch.where(moved.to(weight.dtype) == weight, moved, values)  # below a power of two it is half


if __name__ == "__main__":
    sys.exit(main())
