"""How fast a step will run: the share of the peak that a model of a size reaches, and launch-bound steps.

Both are estimates for `dpo plan`. docs/gpu.md says how they were made; no card has confirmed them yet.
"""

import numpy as np

MFU_BY_PARAMETERS = {124e6: 0.19, 1.2e9: 0.32, 8e9: 0.33}
"""Parameters -> useful operations over the peak of one H100 in bfloat16, micro-batches of 16,384 tokens.

Source: estimated in November 2026 from a step's matrix products at 0.65 of the peak (0.5 in small models)
and the bytes that its other operations read and write, at 2.7 TB/s; not measured. The latter take most of the
time of small models.
"""
LAUNCH_SECONDS = 6e-6
"""Of the host, for one operation of a model that is not compiled: the usual 5 to 10 microseconds."""


def expected_mfu(parameters: int) -> float:
    """The share of the peak for a model of this size: between entries of the table, by the logarithm."""
    sizes, shares = np.log([*MFU_BY_PARAMETERS]), [*MFU_BY_PARAMETERS.values()]
    return float(np.interp(np.log(max(1, parameters)), sizes, shares))


def launch_note(operations: int, flops: float, *, useful_flops: float, tokens: int) -> str | None:
    """A warning if the host needs longer to launch a micro-batch than the GPU to compute it, else None.

    Args:
        operations: Of a micro-batch's forward and backward pass.
        flops: Useful floating-point operations of that micro-batch.
        useful_flops: What a GPU does of them in a second.
        tokens: Of the micro-batch.
    """
    launching, computing = operations * LAUNCH_SECONDS, flops / useful_flops
    if launching <= computing:
        return None
    return (
        f"launch-bound: a micro-batch of at most {tokens:,} tokens has {operations:,} operations, which take "
        f"about {launching * 1e3:,.1f} ms to launch and {computing * 1e3:,.1f} ms to compute: larger "
        "micro-batches, with enough pairs per step to fill them, would use the GPUs better"
    )
