"""Groups of token ids -> the tensors of one micro-batch: each prompt once, then its completions.

A tree is a prompt followed by its completions; in each completion, positions continue from the prompt's end.
A token attends to tokens of its own segment and of its prompt whose position is not after its own: exactly
what it would attend to in a row of its own (law 3). A completion that is in several pairs occurs once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo.data.key_blocks import FLEX_BLOCK, KeyBlocks, key_blocks
from dpo.data.pieces import Pieces, pieces_of
from dpo.data.records import NO_RIVAL, TokenIds, TokenizedGroup, num_trained, plain_ids

Layout = Literal["flex", "varlen", "packed", "trees", "rows"]
"""How trees are placed in a batch.

packed: all trees in one row, for attention that skips what a token does not attend to. flex: the same, padded
to whole blocks of FlexAttention. varlen: as packed, for FlashAttention over pieces of the row. trees: one
tree per row under a mask, padded. rows: one completion per row with its own copy of the prompt, padded, for
models that cannot share a prompt.
"""

PADDING = -1
NO_WORK = (np.zeros(1, dtype=np.int32), [np.zeros(1, dtype=np.int32)])
"""The tree of a batch without sequences: ranks that have run out of work still call the engine."""

Int64s = npt.NDArray[np.int64]
Tree = tuple[TokenIds, Sequence[TokenIds]]
"""A prompt and its completions."""
_NONE: Int64s = np.zeros(0, dtype=np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeBatch:
    """R rows of T tokens that hold S sequences with N completion tokens, and the B pairs between sequences.

    Completion tokens are those that are trained on; others are read as the tokens of a prompt are.

    Sequences are numbered in the order of their completions; so are segments, each prompt before its
    completions.

    >>> # prompt [7, 8] with completions [1] and [2, 3], the first preferred, in the layout `packed`
    >>> # input_ids = [[7, 8, 1, 2, 3]]     positions = [[0, 1, 2, 2, 3]]
    >>> # segments  = [[0, 0, 1, 2, 2]]     prefixes  = [[0, 0, 0, 0, 0]]
    >>> # predicts  = [1, 1, 3]    targets = [1, 2, 3]    sequences = [0, 1, 1]    pairs = [[0, 1]]
    """

    layout: Layout
    trees: tuple[tuple[int, ...], ...]
    """Number of tokens of each segment of each tree, the prompt first."""
    input_ids: Tensor
    """(R, T) int64 token ids, 0 for padding."""
    positions: Tensor
    """(R, T) int64: position of each token in its own sequence."""
    segments: Tensor
    """(R, T) int32: number of the token's segment in the batch, -1 for padding."""
    prefixes: Tensor
    """(R, T) int32: number of the segment of the token's prompt, -1 for padding."""
    num_readers: Tensor
    """(R, T) int32: number of sequences that the token is part of, in these rows; 0 for padding."""
    predicts: Tensor
    """(N,) int64: index in the flattened rows of the hidden state that predicts each completion token."""
    targets: Tensor
    """(N,) int64: the completion tokens, one sequence after the other."""
    sequences: Tensor
    """(N,) int64: the sequence of each target."""
    num_tokens: Tensor
    """(S,) int64: number of completion tokens of each sequence."""
    pairs: Tensor
    """(B, 2) int64: sequences of the chosen and the rejected completion, `NO_RIVAL` where there is none."""
    num_chosen: int = 0
    """Pairs that have a chosen completion."""
    num_rejected: int = 0
    """Pairs that have a rejected completion."""
    mismatched: Tensor | None = None
    """(M,) int64: sequences whose completion is of another prompt; None where none are needed."""
    reference: Tensor | None = None
    """(S,) float64 reference log-probs in nats, or (N,) of completion tokens; None where none are needed."""
    quantiles: Tensor | None = None
    """(S,) float64 quantile of each completion's score among the reference's; None where not needed."""
    pair_weights: Tensor | None = None
    """(B,) float64 weight of each pair, for training on preferences."""
    loss_count: float = 0.0
    """What the sum of the pairs' losses is divided by in a mean, for training on preferences."""
    num_real_tokens: int
    """Tokens in the rows, without padding."""
    num_row_tokens: int
    """Tokens that the same sequences have in the layout `rows`, without padding."""
    blocks: Mapping[int | None, KeyBlocks] = field(default_factory=dict)
    """Window -> what FlexAttention computes under it, for windows that were asked for."""
    own_pieces: Pieces | None = None
    """What the layout `varlen` computes, once the batch is on its device."""

    def to(self, device: torch.device, windows: Sequence[int | None] = ()) -> "TreeBatch":
        """The same batch on `device`.

        Args:
            device: Of the model.
            windows: Of the model's layers (`SequenceScorer.windows`), so that in the layout `flex` the blocks
                to compute are found here, in the thread that builds batches, and not while the model waits.
        """

        def moved(tensor: Tensor) -> Tensor:
            if device.type == "cuda":  # a copy from pageable memory would wait for the device
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        tensors: dict[str, Any] = {
            f.name: moved(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        found = {window: self.blocks_of(window) for window in windows if self.layout == "flex"}
        tensors["blocks"] = {
            window: KeyBlocks(*map(moved, blocks)) for window, blocks in {**self.blocks, **found}.items()
        }
        if self.layout == "varlen":
            keys, queries, sizes, *most = self.pieces
            tensors["own_pieces"] = Pieces(moved(keys), moved(queries), moved(sizes), *most)
        return replace(self, **tensors)

    @property
    def pieces(self) -> Pieces:
        """The pieces of the row: found before, or on the CPU now; layout `varlen` only."""
        return self.own_pieces or pieces_of(self.trees)

    def blocks_of(self, window: int | None) -> KeyBlocks:
        """What FlexAttention computes under a window: found before, or on the CPU now; layout `flex` only."""
        return self.blocks.get(window) or key_blocks(self.trees, self.input_ids.shape[1], window)


def group_batch(groups: Sequence[TokenizedGroup], layout: Layout) -> TreeBatch:
    """The trees of groups, in order, with their pairs; see `tree_batch`."""
    pairs: list[tuple[int, int]] = []
    first = 0
    for group in groups:
        pairs.extend(
            (
                first + chosen if chosen != NO_RIVAL else NO_RIVAL,
                first + rejected if rejected != NO_RIVAL else NO_RIVAL,
            )
            for chosen, rejected in group.pairs
        )
        first += len(group.completions)
    return tree_batch([(group.prompt, group.completions) for group in groups], layout, pairs)


def tree_batch(trees: Sequence[Tree], layout: Layout, pairs: Sequence[tuple[int, int]] = ()) -> TreeBatch:
    """Lays out trees as the tensors of a batch.

    Args:
        trees: Prompts of at least one token, each with at least one completion; without any, the batch is a
            row of two tokens that predicts nothing.
        layout: How trees are placed in rows.
        pairs: (chosen, rejected) sequence numbers, or `NO_RIVAL`.
    """
    laid_out = LAYOUTS[layout](trees or [NO_WORK])
    lengths = tuple((len(prompt), *map(len, completions)) for prompt, completions in laid_out.trees)
    tokens = np.concatenate(
        [part for prompt, completions in laid_out.trees for part in (prompt, *completions)]
    )
    structure = _structure(lengths)
    completions = [completion for _, completions in trees for completion in completions]
    targets = np.concatenate([_NONE, *completions]).astype(np.int64)
    trained = targets >= 0
    num_tokens = [num_trained(completion) for completion in completions]
    predicts = laid_out.places[structure.predictors[trained]] if trees else _NONE

    def placed(values: npt.NDArray[np.integer], dtype: type, padding: int = 0) -> Tensor:
        rows: npt.NDArray[np.integer] = np.full(laid_out.shape, padding, dtype=dtype)
        rows.reshape(-1)[laid_out.places] = values
        return torch.from_numpy(rows)

    return TreeBatch(
        layout=layout,
        trees=lengths,
        input_ids=placed(plain_ids(tokens), np.int64),
        positions=placed(structure.positions, np.int64),
        segments=placed(structure.segments, np.int32, PADDING),
        prefixes=placed(structure.prefixes, np.int32, PADDING),
        num_readers=placed(structure.num_readers * bool(trees), np.int32),
        predicts=torch.from_numpy(predicts),
        targets=torch.from_numpy(targets[trained]),
        sequences=torch.from_numpy(np.repeat(np.arange(len(num_tokens)), num_tokens)),
        num_tokens=torch.tensor(num_tokens or [0], dtype=torch.int64),
        pairs=torch.tensor(list(pairs), dtype=torch.int64).reshape(-1, 2),
        num_chosen=sum(chosen != NO_RIVAL for chosen, _ in pairs),
        num_rejected=sum(rejected != NO_RIVAL for _, rejected in pairs),
        num_real_tokens=len(tokens) if trees else 0,
        num_row_tokens=sum(len(p) + len(c) for p, completions in trees for c in completions),
    )


def sequence_batch(sequences: Sequence[tuple[TokenIds, TokenIds]], layout: Layout = "rows") -> TreeBatch:
    """Sequences of (prompt, completion), each a tree of its own."""
    return tree_batch([(prompt, [completion]) for prompt, completion in sequences], layout)


class _LaidOut(NamedTuple):
    """Where the tokens of trees go."""

    trees: Sequence[Tree]
    """As they are in the rows; their tokens are numbered in this order."""
    shape: tuple[int, int]
    """R rows of T tokens."""
    places: Int64s
    """Index of each token in the flattened rows."""


def _packed(trees: Sequence[Tree]) -> _LaidOut:
    """One row without padding."""
    total = int(_sizes(trees).sum())
    return _LaidOut(trees, (1, total), np.arange(total))


def _flex(trees: Sequence[Tree]) -> _LaidOut:
    """One row, padded to whole blocks."""
    packed = _packed(trees)
    blocks = -(-packed.shape[1] // FLEX_BLOCK)
    return packed._replace(shape=(1, blocks * FLEX_BLOCK))


def _trees(trees: Sequence[Tree]) -> _LaidOut:
    """One tree per row, padded to the longest."""
    sizes = _sizes(trees)
    width = int(sizes.max())
    before = np.cumsum(sizes) - sizes
    shift = np.arange(len(sizes)) * width - before
    return _LaidOut(trees, (len(sizes), width), np.arange(int(sizes.sum())) + np.repeat(shift, sizes))


def _rows(trees: Sequence[Tree]) -> _LaidOut:
    """One completion per row, after its own copy of the prompt."""
    return _trees([(prompt, [completion]) for prompt, completions in trees for completion in completions])


LAYOUTS: dict[Layout, Callable[[Sequence[Tree]], _LaidOut]] = {
    "flex": _flex,
    "varlen": _packed,
    "packed": _packed,
    "trees": _trees,
    "rows": _rows,
}


def _sizes(trees: Sequence[Tree]) -> Int64s:
    """Tokens of each tree."""
    return np.array([len(prompt) + sum(map(len, completions)) for prompt, completions in trees])


class _Structure(NamedTuple):
    """What each token is, in the order of the trees' tokens."""

    segments: Int64s
    """Number of its segment."""
    prefixes: Int64s
    """Number of its prompt's segment."""
    positions: Int64s
    """Position in its sequence."""
    num_readers: Int64s
    """Number of sequences that it is part of: its tree's, for a token of a prompt."""
    predictors: Int64s
    """For each completion token, the number of the token whose hidden state predicts it."""


def _structure(lengths: Sequence[tuple[int, ...]]) -> _Structure:
    sizes = np.array(list(chain.from_iterable(lengths)))
    per_tree = np.array([len(tree) for tree in lengths])
    prompt_of = np.repeat(np.cumsum(per_tree) - per_tree, per_tree)  # of each segment
    is_prompt = np.arange(len(sizes)) == prompt_of
    starts = np.cumsum(sizes) - sizes
    first_position = np.where(is_prompt, 0, sizes[prompt_of])
    segments = np.repeat(np.arange(len(sizes)), sizes)
    tokens = np.arange(int(sizes.sum()))
    last_of_prompt = (starts + sizes)[prompt_of] - 1
    predictors = np.where(tokens == starts[segments], last_of_prompt[segments], tokens - 1)
    return _Structure(
        segments=segments,
        prefixes=prompt_of[segments],
        positions=tokens - starts[segments] + first_position[segments],
        num_readers=np.where(is_prompt, np.repeat(per_tree - 1, per_tree), 1)[segments],
        predictors=predictors[~is_prompt[segments]],
    )
