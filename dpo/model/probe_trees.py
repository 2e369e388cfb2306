"""The trees of the data on which a model is probed: where layouts go wrong if they ever do.

State that leaks from one segment to the next shows in the first tokens of later completions and later trees,
at any depth and on short trees; what a layer does beyond a window or its best keys shows on the longest
sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo.data.dataset import TokenizedDataset
from dpo.data.records import plain_ids
from dpo.data.trees import Tree

SHORT_PROMPT, SHORT_COMPLETION = 12, 8
"""Tokens of a prompt and a completion in the short trees; numbers that are no multiple of any chunk."""
LONG_COMPLETIONS, SHORT_COMPLETIONS = 2, 3
"""Most completions of a tree: a later one sees what leaks from the first."""


@dataclass(frozen=True, slots=True)
class ProbeTrees:
    """What a model is compared on."""

    short: Sequence[Tree]
    """Two trees, to be in a row: a few tokens of prompts and completions of the data."""
    long: Sequence[Tree]
    """The group with the longest sequence and the one with the most tokens, if it is another, in a row; of
    their completions the longest."""


def probe_trees(datasets: Sequence[TokenizedDataset], *, at_least: int = 0) -> ProbeTrees:
    """Chooses the trees from all data that the model will score.

    Args:
        datasets: At least one group in all.
        at_least: Tokens of the longest sequence that it will score, where samples are longer than the data.
    """
    largest = max(datasets, key=lambda data: int(data.tree_tokens.max(initial=0)))
    longest = max(datasets, key=lambda data: int(data.longest.max(initial=0)))
    prompt, completions = _tree(longest, int(longest.longest.argmax()))
    missing = at_least - len(prompt) - max(map(len, completions))
    if missing > 0:
        completions = [np.resize(completions[0], len(completions[0]) + missing), *completions[1:]]
    return trees_of(_tree(largest, int(largest.tree_tokens.argmax())), (prompt, completions))


def trees_of(largest: Tree, longest: Tree | None = None) -> ProbeTrees:
    """The trees to probe a model with.

    Args:
        largest: The group with the most tokens.
        longest: The group with the longest sequence; None where it is the same.
    """
    long = [_cut(tree) for tree in ([largest] if longest is None else [longest, largest])]
    if len(long) == 2 and _same(*long):
        long = long[:1]
    sources = [long[0], long[-1]]
    return ProbeTrees(short=[_short(tree, later=n) for n, tree in enumerate(sources)], long=long)


def _tree(data: TokenizedDataset, index: int) -> Tree:
    group = data[index]
    return group.prompt, [plain_ids(ids) for ids in group.completions]  # every token is compared


def _cut(tree: Tree) -> Tree:
    """A tree with its longest completions, in their order."""
    prompt, completions = tree
    by_length = sorted(range(len(completions)), key=lambda number: -len(completions[number]))
    return prompt, [completions[number] for number in sorted(by_length[:LONG_COMPLETIONS])]


def _short(tree: Tree, *, later: int) -> Tree:
    """The ends of a prompt and the starts of its completions; two different ones where the tree has one."""
    prompt, completions = tree
    start = prompt[-(SHORT_PROMPT - later) :]
    chosen = [completion[: SHORT_COMPLETION - number] for number, completion in enumerate(completions)]
    return start, chosen[:SHORT_COMPLETIONS]


def _same(left: Tree, right: Tree) -> bool:
    parts = [[tree[0], *tree[1]] for tree in (left, right)]
    return len(parts[0]) == len(parts[1]) and all(map(np.array_equal, *parts))
