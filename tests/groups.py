"""Random tokenized groups for property tests, and how to compare two of them."""

import numpy as np
from hypothesis import strategies as st

from dpo.data.records import Pair, TokenIds, TokenizedGroup


def ids(*values: int) -> TokenIds:
    return np.array(values, dtype=np.int32)


TOKENS = st.lists(st.integers(0, 99), min_size=1, max_size=5).map(lambda values: ids(*values))


@st.composite
def tokenized_groups(draw: st.DrawFn) -> TokenizedGroup:
    """A prompt with 2 to 5 completions and 1 to 6 pairs between them, with or without scores."""
    completions = draw(st.lists(TOKENS, min_size=2, max_size=5))
    index = st.integers(0, len(completions) - 1)
    either = st.tuples(index, index).filter(lambda pair: pair[0] != pair[1])
    pairs = draw(st.lists(either, min_size=1, max_size=6, unique=True))
    margin = st.floats(-10, 10)
    margins = st.lists(margin, min_size=len(pairs), max_size=len(pairs)).map(tuple)
    return TokenizedGroup(
        prompt=draw(TOKENS),
        completions=tuple(completions),
        pairs=tuple(Pair(*pair) for pair in pairs),
        margins=draw(st.none() | margins),
    )


def same(one: TokenizedGroup, other: TokenizedGroup) -> bool:
    """Whether two groups are equal in everything."""
    parts = [(group.prompt, *group.completions) for group in (one, other)]
    lists = [[part.tolist() for part in segments] for segments in parts]
    return lists[0] == lists[1] and (one.pairs, one.margins) == (other.pairs, other.margins)
