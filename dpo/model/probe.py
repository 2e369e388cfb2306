"""Which layouts does a model compute as its authors wrote it? Tested at every start, before any result.

The authors' model is called with one unpadded sequence at a time, with its own attention and logits, in
evaluation mode and float32. A layout is used if no token's log-prob differs from that by more than rounding
explains, on short trees in a row and on the longest of the data. A model that differs in every layout, or
looks ahead, is refused. `dpo.engine.scoring` decides what is compared in float32, and with how many blocks.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo.data.trees import Layout, Tree, TreeBatch, sequence_batch, tree_batch
from dpo.model.files import first_line

TOLERANCE, ROUNDING_FACTOR, MOST_TOLERANCE = 1e-4, 10.0, 1e-2
"""Nats by which a token's log-prob may differ in float32, at least; or this factor times what it moves when
the end of its sequence is cut off, at most the third."""
LOOKS_AHEAD = 1e-3
"""Nats by which a later token may move a log-prob in float32: experts are given other numbers of tokens."""
KEPT, KEPT_OF = 2, 3
"""Part of a completion that is left when its end is cut off."""
NOISE_FACTOR, LEAST_NOISE = 3.0, 1 / 30
"""In bfloat16 a layout may differ, root mean square, by this factor times the difference of rows in one batch
and alone, or times this many nats if that is more. On CPUs rows differ by 1e-5 where another order of sums
moves right layouts of a model of 135M by 0.04 to 0.09; what is wrong with a layout shows in float32."""

PROJECTION_NOISE = 0.3
"""Nats by which log-probs of our projection may differ in bfloat16, from logits that were rounded to it."""

Score = Callable[..., Tensor]
"""(batch, per_token=True, own_projection=..., one_at_a_time=..., as_written=...) -> (N,) log-probs: a
`SequenceScorer`, wrapped or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What was found for a model."""

    layout: Layout
    """The fastest layout that is exact."""
    one_at_a_time: bool = False
    """Whether its rows need a pass each, without padding."""
    uses_projection: bool
    """Whether our output projection agrees with the model's own."""
    notes: tuple[str, ...]
    """Why faster options are not used, to be shown to the user."""
    refusal: str | None = None
    """Why the model cannot be used at all."""


class Comparison:
    """A model as its authors wrote it, on some trees; computed once, and compared with every layout."""

    def __init__(
        self,
        score: Score,
        trees: Sequence[Tree],
        *,
        device: torch.device,
        windows: Sequence[int | None] = (),
        exact: bool = True,
    ) -> None:
        """Prepares the comparison; nothing is computed yet.

        Args:
            score: The model, or its first blocks.
            trees: At least one.
            device: Of the model.
            windows: Of its layers; see `TreeBatch.to`.
            exact: It computes in float32. Otherwise layouts are compared with the noise of the compute type.
        """
        self._score, self._trees, self._device, self._windows = score, trees, device, windows
        self.exact = exact
        self._expected: Tensor | None = None
        self.limit = 0.0
        """Nats by which a layout may differ, if `exact`; known after `refusal`."""
        self._rounding = 0.0

    def refusal(self) -> str | None:
        """Why the model cannot be used in any layout, or None; to be asked first."""
        sequences = [(prompt, end) for prompt, completions in self._trees for end in completions]
        expected = [self._logps(sequence_batch([sequence]), as_written=True) for sequence in sequences]
        self._expected = torch.cat(expected)
        if not self._expected.isfinite().all():
            return "its log-probs are not finite: check its weights, or set model.dtype: float32"
        if not self.exact:
            return None
        longest = max(range(len(sequences)), key=lambda number: sum(map(len, sequences[number])))
        prompt, completion = sequences[longest]
        kept = max(1, KEPT * len(completion) // KEPT_OF)
        cut = sequence_batch([(prompt, completion[:kept])])
        seen = self._logps(cut, as_written=True)
        moved = _largest(self._logps(_other_end(cut), as_written=True), seen)
        if not moved <= LOOKS_AHEAD:
            return (
                f"it is not causal: another last token moves log-probs before it by {moved:.2g} nats; "
                "expected a decoder that predicts each token from those before it"
            )
        self._rounding = _largest(seen, expected[longest][:kept])
        self.limit = min(max(TOLERANCE, ROUNDING_FACTOR * self._rounding), MOST_TOLERANCE)
        return None

    def problem_of_projection(self) -> str | None:
        """Why our output projection is not used instead of the model's own logits, or None."""
        prompt, completions = self._trees[0]
        batch = sequence_batch([(prompt, completions[0])])
        ours = self._logps(batch, own_projection=False, one_at_a_time=False)
        difference = _largest(ours, self._logps(batch, as_written=True))
        if difference <= (self.limit if self.exact else PROJECTION_NOISE):
            return None
        return f"ours differs by {difference:.2g} nats per token"

    def problem(self, layout: Layout, *, own: bool, one_at_a_time: bool) -> str | None:
        """Why a layout is not used, or None."""
        assert self._expected is not None
        if self.exact and not one_at_a_time and self._rounding > LOOKS_AHEAD:
            return (  # as where keys of equal score are selected: it can differ on data that is not probed
                f"the model's own log-probs move by {self._rounding:.2g} nats when a sequence is cut short"
            )
        found = self._in_layout(layout, own=own, one_at_a_time=one_at_a_time)
        if self.exact:
            difference = _largest(found, self._expected)
            if difference <= self.limit:
                return None
            return (
                f"a token's log-prob differs by {difference:.2g} nats from the model's own, and rounding "
                f"explains {self.limit:.2g}"
            )
        if layout == "rows":
            return None  # it is the measure of noise
        rows = self._in_layout("rows", own=own, one_at_a_time=False)
        first = torch.from_numpy(_first_tokens(self._trees)).to(found.device)
        difference = max(_rms(found, self._expected), _rms(found[first], self._expected[first]))
        limit = NOISE_FACTOR * max(LEAST_NOISE, _rms(rows, self._expected))
        if difference <= limit:
            return None
        return f"log-probs differ by {difference:.2g} nats per token from rows; noise is {limit:.2g} at most"

    def _in_layout(self, layout: Layout, *, own: bool, one_at_a_time: bool) -> Tensor:
        batch = tree_batch(self._trees, layout)
        return self._logps(batch, own_projection=own, one_at_a_time=one_at_a_time)

    @torch.no_grad()
    def _logps(self, batch: TreeBatch, **options: bool) -> Tensor:
        """(N,) float64 log-probs of a batch's completion tokens."""
        token_logps = self._score(batch.to(self._device, self._windows), per_token=True, **options)
        return token_logps.double()


def probe(layouts: Sequence[Layout], comparisons: Sequence[Comparison]) -> Probed:
    """Finds the first layout that is exact in all comparisons. All ranks of a sharded model must call it.

    Args:
        layouts: To try, the fastest first; the last is `rows`, which is tried with and without padding.
        comparisons: At least one, the cheapest first.
    """
    if refusal := _first_problem([comparison.refusal for comparison in comparisons]):
        return Probed(layout="rows", uses_projection=False, notes=(), refusal=refusal)
    notes: list[str] = []
    if problem := _first_problem([comparisons[0].problem_of_projection]):
        notes.append(f"the model's own output projection is used: {problem}")
    own = bool(problem)
    for layout, apart in (*((layout, False) for layout in layouts), ("rows", True)):
        questions = [partial(each.problem, layout, own=own, one_at_a_time=apart) for each in comparisons]
        problem = _first_problem(questions)
        if problem is None:
            alone = ", each in a pass of its own" if apart else ""
            if layout == "rows" and (apart or len(layouts) == 1):
                notes.append(f"this model cannot share a prompt: one row per completion{alone}")
            return Probed(layout=layout, one_at_a_time=apart, uses_projection=not own, notes=tuple(notes))
        notes.append(f"layout {layout} is not used: {problem}")
    return Probed(layout="rows", uses_projection=False, notes=tuple(notes), refusal=problem)


def _first_problem(questions: Iterable[Callable[[], str | None]]) -> str | None:
    """The first answer that is a problem; what a model raises is one."""
    for question in questions:
        try:
            problem = question()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a model's code may raise anything for inputs that it does not expect
            problem = f"the model raised {type(error).__name__}: {first_line(error)}"
        if problem is not None:
            return problem
    return None


def _other_end(batch: TreeBatch) -> TreeBatch:
    """The batch of one sequence, with another last token and the same targets."""
    ids = batch.input_ids.clone()
    others = ids[0, ids[0] != ids[0, -1]]
    ids[0, -1] = others[0] if len(others) else (ids[0, -1] - 1).abs()
    return replace(batch, input_ids=ids)


def _first_tokens(trees: Sequence[Tree]) -> npt.NDArray[np.int64]:
    """Index of each completion's first token among all completion tokens."""
    lengths = [len(completion) for _, completions in trees for completion in completions]
    return np.cumsum([0, *lengths[:-1]])


def _largest(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def _rms(found: Tensor, expected: Tensor) -> float:
    return float(np.sqrt(((found - expected) ** 2).mean().item()))
