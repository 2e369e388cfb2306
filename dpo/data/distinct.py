"""Which completions and pairs of a group in token ids say something: each distinct one, once.

Truncation and tokenizing may make texts equal that differ; nothing is computed twice, or for no pair.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from dpo.data.pairing import quantiles
from dpo.data.records import NO_RIVAL, Pair, TokenIds, TokenizedGroup


def split_pairs(group: TokenizedGroup) -> Iterator[TokenizedGroup]:
    """Every pair of a group as a group of its own, with its margin."""
    margins = group.margins or [None] * len(group.pairs)
    for (chosen, rejected), margin in zip(group.pairs, margins, strict=True):
        named = [index for index in (chosen, rejected) if index != NO_RIVAL]
        alone = Pair(NO_RIVAL, 0) if chosen == NO_RIVAL else Pair(0, NO_RIVAL)
        yield TokenizedGroup(
            prompt=group.prompt,
            completions=tuple(group.completions[index] for index in named),
            pairs=(Pair(0, 1) if len(named) == 2 else alone,),
            margins=None if margin is None else (margin,),
            quantiles=group.quantiles and tuple(group.quantiles[index] for index in named),
        )


def telling_pairs(pairs: Sequence[Pair], completions: Sequence[list[int]]) -> tuple[Pair, ...]:
    """Without pairs of equal completions in token ids, and labels that contradict each other there."""
    desirable = {tuple(completions[pair.chosen]) for pair in pairs if pair.rejected == NO_RIVAL}
    undesirable = {tuple(completions[pair.rejected]) for pair in pairs if pair.chosen == NO_RIVAL}
    both = desirable & undesirable

    def tells(pair: Pair) -> bool:
        if NO_RIVAL in pair:
            return tuple(completions[max(pair)]) not in both
        return completions[pair.chosen] != completions[pair.rejected]

    return tuple(filter(tells, pairs))


def without_unused(
    prompt: TokenIds,
    completions: list[list[int]],
    pairs: tuple[Pair, ...],
    scores: tuple[float, ...] | None,
    of_reference: tuple[float, ...] | None = None,
) -> TokenizedGroup:
    """Keeps each distinct completion that some pair names, once: nothing is computed for the others.

    Args:
        prompt: Token ids.
        completions: Token ids of each.
        pairs: Indices of completions.
        scores: Of each completion; None without scores.
        of_reference: Scores of what the reference wrote to this prompt. Default: `scores`.
    """
    position: dict[tuple[int, ...], int] = {}
    for index in sorted({index for pair in pairs for index in pair} - {NO_RIVAL}):
        position.setdefault(tuple(completions[index]), len(position))

    def place(index: int) -> int:
        return NO_RIVAL if index == NO_RIVAL else position[tuple(completions[index])]

    shares = quantiles(scores, of_reference or scores) if scores else ()
    kept: dict[tuple[int, ...], float] = {}  # of completions that became equal the first counts
    for ids, share in zip(completions, shares, strict=False):
        kept.setdefault(tuple(ids), share)
    margins: dict[Pair, float] = {}  # of pairs that became equal the first counts
    for chosen, rejected in pairs:
        renamed = Pair(place(chosen), place(rejected))
        rivals = NO_RIVAL not in renamed
        margins.setdefault(renamed, scores[chosen] - scores[rejected] if scores and rivals else 0.0)
    return TokenizedGroup(
        prompt=prompt,
        completions=tuple(np.asarray(ids, dtype=np.int32) for ids in position),
        pairs=tuple(margins),
        margins=tuple(margins.values()) if scores else None,
        quantiles=tuple(kept[ids] for ids in position) if scores else None,
    )
