"""The pieces of a packed row that a kernel for sequences of different lengths computes: `varlen_attn`.

Each piece is a segment's queries with the keys of [prompt; segment], or a prompt with its only completion. A
query attends to the keys up to its own place, counted from the end: the kernel's causal mask. The keys of a
prompt are gathered once for each of its completions.
"""

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Pieces(NamedTuple):
    """P pieces of a row of T tokens, with K keys in all."""

    keys: Tensor
    """(K,) int64: token of each key, piece after piece."""
    query_starts: Tensor
    """(P + 1,) int32: first query of each piece, and T. Queries are the tokens in their order."""
    key_starts: Tensor
    """(P + 1,) int32: first key of each piece, and K."""
    most_queries: int
    """Of a piece."""
    most_keys: int
    """Of a piece."""


def pieces_of(trees: Sequence[Sequence[int]]) -> Pieces:
    """The pieces of packed trees.

    Args:
        trees: Number of tokens of each segment of each tree, the prompt first.
    """
    keys: list[range] = []
    queries: list[int] = []
    sizes: list[int] = []
    start = 0
    for prompt, *completions in trees:
        shared = range(start, start + prompt)
        if len(completions) == 1:
            keys.append(range(start, start + prompt + completions[0]))
            queries.append(prompt + completions[0])
            sizes.append(prompt + completions[0])
        else:
            keys.append(shared)
            queries.append(prompt)
            sizes.append(prompt)
            first = start + prompt
            for length in completions:
                keys += [shared, range(first, first + length)]
                queries.append(length)
                sizes.append(prompt + length)
                first += length
        start += prompt + sum(completions)
    return Pieces(
        keys=torch.from_numpy(np.fromiter(chain.from_iterable(keys), dtype=np.int64)),
        query_starts=_starts(queries),
        key_starts=_starts(sizes),
        most_queries=max(queries),
        most_keys=max(sizes),
    )


def _starts(lengths: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths]).astype(np.int32))
