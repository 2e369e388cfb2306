"""Which layouts does this model compute exactly? Tested once at the start, on the longest group.

A model that cannot share a prefix (ALiBi, recurrent layers, an unknown attention pattern) would give wrong
numbers without an error. So its log-probs on trees are first compared with those on plain rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo.data.trees import Layout, Tree, TreeBatch, tree_batch

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1}
"""Compute dtype -> root mean square difference of token log-probs, in nats, that rounding explains."""

Score = Callable[..., Tensor]
"""(batch, per_token=True, own_projection=...) -> (N,) log-probs: a `SequenceScorer`, wrapped or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What was found for a model."""

    layout: Layout
    """The fastest layout that is exact."""
    uses_projection: bool
    """Whether our output projection agrees with the model's own."""
    notes: tuple[str, ...]
    """Why faster options are not used, to be shown to the user."""


def probe(
    score: Score, layouts: Sequence[Layout], longest: Tree, *, dtype: torch.dtype, device: torch.device
) -> Probed:
    """Finds the first layout whose log-probs equal those of plain rows with the model's own logits.

    All ranks of a sharded model must call it.

    Args:
        score: The model.
        layouts: Layouts to try, the fastest first; the last, `rows`, is always exact.
        longest: The longest prompt with completions in the data.
        dtype: The compute dtype.
        device: Of the model.
    """
    notes: list[str] = []

    @torch.no_grad()
    def logps(tree: Tree, layout: Layout, *, own: bool) -> Tensor:
        batch: TreeBatch = tree_batch([tree], layout).to(device)
        token_logps: Tensor = score(batch, per_token=True, own_projection=own)
        return token_logps.double()

    prompt, completions = longest
    shortest = prompt, [min(completions, key=len)]
    difference = _rms(logps(shortest, "rows", own=False), logps(shortest, "rows", own=True))
    uses_projection = difference <= TOLERANCE[dtype]
    if not uses_projection:
        notes.append(
            f"the model's own output projection is used: ours differs by {difference:.2g} nats per token"
        )
    rows = torch.cat([logps((prompt, [own]), "rows", own=not uses_projection) for own in completions])
    for layout in layouts[:-1]:
        try:
            difference = _rms(logps(longest, layout, own=not uses_projection), rows)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model's code may raise anything for inputs that it does not expect
            notes.append(f"layout {layout} is not used: the model raised {type(error).__name__}: {error}")
            continue
        if difference <= TOLERANCE[dtype]:
            return Probed(layout=layout, uses_projection=uses_projection, notes=tuple(notes))
        notes.append(
            f"layout {layout} is not used: log-probs differ by {difference:.2g} nats per token from rows"
        )
    if not notes or len(layouts) == 1:
        notes.append("this model cannot share a prompt between completions: one row per completion")
    return Probed(layout=layouts[-1], uses_projection=uses_projection, notes=tuple(notes))


def _rms(found: Tensor, expected: Tensor) -> float:
    return float(np.sqrt(((found - expected) ** 2).mean().item()))
