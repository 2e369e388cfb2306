"""Groups of token ids -> the tensors of one micro-batch: each prompt once, then its completions.

A tree is a prompt and its completions one after the other; positions restart at the prompt's end in each
completion. A token sees the tokens of its own segment and of its prompt whose position is not after its own:
what it would see in a row of its own (law 3). A completion that stands in several pairs stands here once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo.data.records import TokenIds, TokenizedGroup

Layout = Literal["flex", "packed", "trees", "rows"]
"""How trees lie in a batch. flex and packed: all in one row, for attention that skips what a tree does not
see (flex: padded to whole blocks of FlexAttention); trees: one a row under a mask, padded; rows: one
completion a row with its own copy of the prompt, padded, for models that cannot share one."""

FLEX_BLOCK = 128
PADDING = -1

Int64s = npt.NDArray[np.int64]
Tree = tuple[TokenIds, Sequence[TokenIds]]
"""A prompt and its completions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeBatch:
    """R rows of T tokens, with S sequences in them and the B pairs between these.

    >>> # prompt [7, 8] with completions [1] and [2, 3], the first preferred, in the layout `packed`
    >>> # input_ids = [[7, 8, 1, 2, 3]]     positions = [[0, 1, 2, 2, 3]]
    >>> # segments  = [[0, 0, 1, 2, 2]]     prefixes  = [[0, 0, 0, 0, 0]]
    >>> # predicts  = [1, 1, 3]    targets = [1, 2, 3]    sequences = [0, 1, 1]    pairs = [[0, 1]]
    """

    layout: Layout
    trees: tuple[tuple[int, ...], ...]
    """Tokens of the segments of each tree, its prompt first, in the order of the tokens."""
    input_ids: Tensor
    """(R, T) int64."""
    positions: Tensor
    """(R, T) int64: of each token in its own sequence."""
    segments: Tensor
    """(R, T) int32: number of the token's segment in the batch, -1 for padding."""
    prefixes: Tensor
    """(R, T) int32: number of the segment of its prompt."""
    predicts: Tensor
    """(N,) int64: where in the flattened rows the hidden state lies that predicts each completion token."""
    targets: Tensor
    """(N,) int64: the completion tokens, sequence after sequence."""
    sequences: Tensor
    """(N,) int64: the sequence of each target."""
    num_tokens: Tensor
    """(S,) int64: completion tokens of each sequence."""
    pairs: Tensor
    """(B, 2) int64: sequences of the chosen and the rejected completion."""
    reference: Tensor | None = None
    """(S,) float64 reference log-probs in nats, or (N,) of completion tokens; None where nothing compares."""
    pair_weights: Tensor | None = None
    """(B,) float64: how much each pair counts, for training on preferences."""
    loss_count: float = 0.0
    """What the sum of the pairs' losses is divided by in a mean, for training on preferences."""
    num_real_tokens: int
    """Tokens of all trees, without padding."""
    num_row_tokens: int
    """Tokens that the same sequences have in rows of their own, without padding."""

    def to(self, device: torch.device) -> "TreeBatch":
        """The same batch on `device`."""
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        if device.type == "cuda":  # or the copy would wait for the device
            tensors = {name: v.pin_memory() for name, v in tensors.items()}
        moved: dict[str, Any] = {name: v.to(device, non_blocking=True) for name, v in tensors.items()}
        return replace(self, **moved)


def group_batch(groups: Sequence[TokenizedGroup], layout: Layout) -> TreeBatch:
    """The groups' trees one after the other, with their pairs."""
    pairs: list[tuple[int, int]] = []
    first = 0
    for group in groups:
        pairs.extend((first + chosen, first + rejected) for chosen, rejected in group.pairs)
        first += len(group.completions)
    return tree_batch([(group.prompt, group.completions) for group in groups], layout, pairs)


def tree_batch(trees: Sequence[Tree], layout: Layout, pairs: Sequence[tuple[int, int]] = ()) -> TreeBatch:
    """Lays out trees; sequences are numbered in the order in which their completions come.

    Without trees the batch is one of two tokens that predicts nothing: ranks that have run out of work still
    call the engine with it.

    Args:
        trees: Prompts of at least one token, each with at least one completion.
        layout: How they lie in rows.
        pairs: (chosen, rejected) sequences.
    """
    real = sum(len(prompt) + sum(map(len, completions)) for prompt, completions in trees)
    alone = [(prompt, [completion]) for prompt, completions in trees for completion in completions]
    in_rows = sum(len(prompt) + len(completion) for prompt, (completion,) in alone)
    if layout == "rows":
        trees, real = alone, in_rows
    trees = trees or [(np.zeros(1, dtype=np.int32), [np.zeros(1, dtype=np.int32)])]
    lengths = tuple((len(prompt), *map(len, completions)) for prompt, completions in trees)
    tokens = [np.concatenate([prompt, *completions]) for prompt, completions in trees]
    segments, prefixes, positions, predicts = _describe(lengths)
    if layout in ("flex", "packed"):
        rows = np.zeros(len(segments), dtype=np.int64)
        columns = np.arange(len(segments))
        width = len(segments) if layout == "packed" else -(-len(segments) // FLEX_BLOCK) * FLEX_BLOCK
    else:
        sizes = np.array([len(part) for part in tokens])
        rows = np.repeat(np.arange(len(tokens)), sizes)
        columns = np.arange(len(segments)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        width = int(sizes.max())
    shape = (int(rows[-1]) + 1, width)
    completion_tokens = [len(completion) for _, (completion,) in alone]
    places = rows * width + columns
    return TreeBatch(
        layout=layout,
        trees=lengths,
        input_ids=_filled(shape, places, np.concatenate(tokens), np.int64),
        positions=_filled(shape, places, positions, np.int64),
        segments=_filled(shape, places, segments, np.int32, PADDING),
        prefixes=_filled(shape, places, prefixes, np.int32, PADDING),
        predicts=torch.from_numpy(places[predicts] if alone else np.zeros(0, dtype=np.int64)),
        targets=torch.from_numpy(
            np.concatenate([np.zeros(0, dtype=np.int64), *(completion for _, (completion,) in alone)]).astype(
                np.int64
            )
        ),
        sequences=torch.from_numpy(np.repeat(np.arange(len(alone)), completion_tokens)),
        num_tokens=torch.tensor(completion_tokens or [0], dtype=torch.int64),
        pairs=torch.tensor(list(pairs), dtype=torch.int64).reshape(-1, 2),
        num_real_tokens=real,
        num_row_tokens=in_rows,
    )


def sequence_batch(sequences: Sequence[tuple[TokenIds, TokenIds]], layout: Layout = "rows") -> TreeBatch:
    """Sequences of (prompt, completion), each a tree of its own."""
    return tree_batch([(prompt, [completion]) for prompt, completion in sequences], layout)


def _describe(lengths: Sequence[tuple[int, ...]]) -> tuple[Int64s, Int64s, Int64s, Int64s]:
    """Segment, prompt's segment and position of each token, and the place that predicts each completion
    token.
    """
    sizes = np.array(list(chain.from_iterable(lengths)))
    per_tree = np.array([len(tree) for tree in lengths])
    first = np.cumsum(per_tree) - per_tree  # segment of each tree's prompt
    prompt_of = np.repeat(first, per_tree)
    is_prompt = np.arange(len(sizes)) == prompt_of
    starts = np.cumsum(sizes) - sizes
    begins = np.where(is_prompt, 0, sizes[prompt_of])  # position of each segment's first token
    segments = np.repeat(np.arange(len(sizes)), sizes)
    places = np.arange(int(sizes.sum()))
    positions = places - starts[segments] + begins[segments]
    completion = ~is_prompt[segments]
    before = np.where(places == starts[segments], (starts + sizes)[prompt_of[segments]] - 1, places - 1)
    return segments, prompt_of[segments], positions, before[completion]


def _filled(
    shape: tuple[int, int], places: Int64s, values: npt.NDArray[np.integer], dtype: type, padding: int = 0
) -> Tensor:
    filled: npt.NDArray[np.integer] = np.full(shape[0] * shape[1], padding, dtype=dtype)
    filled[places] = values
    return torch.from_numpy(filled.reshape(shape))
