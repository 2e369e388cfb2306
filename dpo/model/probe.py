"""Which layouts does this model compute exactly? Tested once at the start, on the longest group.

A model that cannot share a prefix (ALiBi, recurrent layers, an unknown attention pattern) would give wrong
numbers without an error. So its log-probs on trees are first compared with those on plain rows: in float32,
where a hidden token stands out, and under bfloat16 on the first blocks for that. The whole model in bfloat16
is then only compared with its own noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpo.data.trees import Layout, Tree, TreeBatch, tree_batch

TOLERANCE = 1e-4
"""Root mean square difference of token log-probs in float32, in nats, that rounding explains."""
NOISE_FACTOR, LEAST_NOISE = 3.0, 0.02
"""In bfloat16 a layout may differ from rows by this factor times the difference of rows in one batch and
alone (0.04 to 0.09 nats per token on a model of 135M), or times this many nats per token if that is more."""

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
    score: Score,
    layouts: Sequence[Layout],
    longest: Tree,
    *,
    dtype: torch.dtype,
    device: torch.device,
    precise: Score | None = None,
) -> Probed:
    """Finds the first layout whose log-probs equal those of plain rows with the model's own logits.

    All ranks of a sharded model must call it.

    Args:
        score: The model.
        layouts: Layouts to try, the fastest first; the last, `rows`, is always exact.
        longest: The longest prompt with completions in the data.
        dtype: The compute dtype.
        device: Of the model.
        precise: The first blocks of the model in float32 (`first_blocks`), for a model in bfloat16. Without
            it, a layout is only compared with the model's noise.
    """
    notes: list[str] = []
    whole = _Model(score, longest, device)
    exact = _Model(precise, longest, device) if precise else None
    if dtype == torch.float32:
        exact = whole
    difference = (exact or whole).of_projection()
    uses_projection = difference <= (TOLERANCE if exact else whole.noise_limit(own=False))
    if not uses_projection:
        notes.append(
            f"the model's own output projection is used: ours differs by {difference:.2g} nats per token"
        )
    for layout in layouts[:-1]:
        try:
            problem = _problem(exact, whole, layout, own=not uses_projection)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model's code may raise anything for inputs that it does not expect
            problem = f"the model raised {type(error).__name__}: {error}"
        if problem is None:
            return Probed(layout=layout, uses_projection=uses_projection, notes=tuple(notes))
        notes.append(f"layout {layout} is not used: {problem}")
    if not notes or len(layouts) == 1:
        notes.append("this model cannot share a prompt between completions: one row per completion")
    return Probed(layout=layouts[-1], uses_projection=uses_projection, notes=tuple(notes))


class _Model:
    """Log-probs of the longest group under one scoring function."""

    def __init__(self, score: Score, longest: Tree, device: torch.device) -> None:
        self._score, self._longest, self._device = score, longest, device
        self._alone: dict[bool, Tensor] = {}

    @torch.no_grad()
    def logps(self, tree: Tree, layout: Layout, *, own: bool) -> Tensor:
        """(N,) float64 log-probs of a tree's completion tokens; `own`: through the model's own logits."""
        batch: TreeBatch = tree_batch([tree], layout).to(self._device)
        token_logps: Tensor = self._score(batch, per_token=True, own_projection=own)
        return token_logps.double()

    def alone(self, *, own: bool) -> Tensor:
        """Those of every completion in a batch of its own."""
        if own not in self._alone:
            prompt, completions = self._longest
            rows = [self.logps((prompt, [completion]), "rows", own=own) for completion in completions]
            self._alone[own] = torch.cat(rows)
        return self._alone[own]

    def difference(self, layout: Layout, *, own: bool) -> float:
        """Of a layout from rows alone, root mean square in nats per token."""
        return _rms(self.logps(self._longest, layout, own=own), self.alone(own=own))

    def of_projection(self) -> float:
        """Of our output projection from the model's own, on the shortest completion."""
        prompt, completions = self._longest
        shortest = prompt, [min(completions, key=len)]
        return _rms(self.logps(shortest, "rows", own=False), self.logps(shortest, "rows", own=True))

    def noise_limit(self, *, own: bool) -> float:
        """What rounding explains, by what it does to rows that are computed together."""
        return NOISE_FACTOR * max(LEAST_NOISE, self.difference("rows", own=own))


def _problem(exact: _Model | None, whole: _Model, layout: Layout, *, own: bool) -> str | None:
    """Why a layout is not used, or None."""
    if exact is not None:
        difference = exact.difference(layout, own=own)
        if difference > TOLERANCE:
            return f"log-probs differ by {difference:.2g} nats per token from rows"
    if exact is not whole:
        difference, limit = whole.difference(layout, own=own), whole.noise_limit(own=own)
        if difference > limit:
            return (
                f"log-probs differ by {difference:.2g} nats per token from rows; noise is {limit:.2g} at most"
            )
    return None


def _rms(found: Tensor, expected: Tensor) -> float:
    return float(np.sqrt(((found - expected) ** 2).mean().item()))
