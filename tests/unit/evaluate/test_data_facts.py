"""A data set described: by hand on a small one, and against plain Python loops on random ones."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from groups import ids, tokenized_groups
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo.data.dataset import TokenizedDataset, map_dataset, write_dataset
from dpo.data.mismatched import with_mismatched
from dpo.data.records import NO_RIVAL, Pair, TokenizedGroup
from dpo.evaluate.data_facts import data_facts, number_alike, overlap, pair_groups, pair_sequences, pair_trees
from dpo.evaluate.described_data import TRAINING, describe

GOOD, BAD, WORSE = ids(3, 4, 5), ids(6), ids(7, 8)
GROUPS = (
    TokenizedGroup(prompt=ids(1, 2), completions=(GOOD, BAD, WORSE), pairs=(Pair(0, 1), Pair(0, 2))),
    TokenizedGroup(
        prompt=ids(1, 2), completions=(BAD, GOOD), pairs=(Pair(0, 1),)
    ),  # the reverse of the first
    TokenizedGroup(prompt=ids(9), completions=(GOOD, BAD), pairs=(Pair(0, 1),)),
    TokenizedGroup(prompt=ids(1, 2), completions=(WORSE, GOOD), pairs=(Pair(1, 0),)),  # the second again
    TokenizedGroup(prompt=ids(1), completions=(ids(2, 3, 4, 5), ids(2, 6, 7, 8)), pairs=(Pair(0, 1),)),
)


def written(groups: Sequence[TokenizedGroup], folder: Path) -> TokenizedDataset:
    write_dataset(groups, folder, Counter({"dropped/too_long": 2, "truncated/prompts": 0}))
    return map_dataset(folder, "digest")


def test_a_small_data_set_by_hand(tmp_path: Path) -> None:
    data = written(GROUPS, tmp_path / "data")
    facts = data_facts(data, number_alike([data])[0])
    assert (facts.groups, facts.pairs, facts.sequences, facts.prompts) == (5, 6, 11, 3)
    assert facts.counts == {"dropped/too_long": 2}  # a reason without rows is not listed
    assert facts.prompt_tokens.tolist() == [2, 2, 1, 2, 1]
    assert facts.chosen_tokens.tolist() == [3, 3, 1, 3, 3, 4]
    assert facts.rejected_tokens.tolist() == [1, 2, 3, 1, 2, 4]
    assert facts.sharing.tolist() == [True, True, True, False, True, False]
    assert facts.repeated.tolist() == [False, False, False, False, True, False]
    assert facts.contradicted.tolist() == [True, False, True, False, False, False]
    assert facts.tree_tokens == (2 + 6) + (2 + 4) + (1 + 4) + (2 + 5) + (1 + 8)
    assert facts.row_tokens == (3 * 2 + 6) + (2 * 2 + 4) + (2 * 1 + 4) + (2 * 2 + 5) + (2 * 1 + 8)
    assert facts.longer_chosen is not None
    assert (facts.differing, facts.longer_chosen.mean) == (5, 4 / 5)  # the last pair has equal lengths
    assert facts.longer_by is not None
    assert facts.longer_by.mean == pytest.approx((2 + 1 - 2 + 2 + 1 + 0) / 6)


def test_labels_are_described_without_lengths_of_rivals(tmp_path: Path) -> None:
    good, bad = Pair(0, NO_RIVAL), Pair(NO_RIVAL, 0)
    labels = [
        TokenizedGroup(prompt=ids(1), completions=(GOOD, BAD), pairs=(good, Pair(NO_RIVAL, 1))),
        TokenizedGroup(prompt=ids(1), completions=(GOOD,), pairs=(bad,)),  # the opposite of the first
        TokenizedGroup(prompt=ids(2), completions=(WORSE,), pairs=(bad,)),
    ]
    data = written(labels, tmp_path / "labels")
    (numbered,) = number_alike([data])
    facts = data_facts(data, numbered)
    assert (facts.pairs, facts.labels, facts.longer_by, facts.longer_chosen) == (4, (1, 3), None, None)
    assert (facts.chosen_tokens.tolist(), facts.rejected_tokens.tolist()) == ([3], [1, 3, 2])
    assert facts.contradicted.tolist() == [True, False, True, False]
    assert facts.repeated.tolist() == [False] * 4
    trees = pair_trees(data, np.array([0, 2]))
    assert [[part.tolist() for part in completions] for _, completions in trees] == [
        [GOOD.tolist(), []],
        [[], GOOD.tolist()],
    ]
    others = with_mismatched(data, "data.train")
    assert len(others.keys) == len(data.keys) + 3
    of_others = data_facts(others, number_alike([others])[0])
    for name in ("sequences", "tree_tokens", "row_tokens", "pairs", "labels"):
        assert getattr(of_others, name) == getattr(facts, name), name
    described = describe({TRAINING: data}, {TRAINING: np.zeros(len(data.keys))})
    assert described.splits[TRAINING].ranking is None
    assert described.summary()["training/labels/undesirable"] == 3
    mixed = written([*GROUPS, *labels], tmp_path / "mixed")
    facts = data_facts(mixed, number_alike([mixed])[0])
    assert (facts.pairs, facts.labels, facts.differing) == (10, (1, 3), 5)
    ranking = describe({TRAINING: mixed}, {TRAINING: np.zeros(len(mixed.keys))}).splits[TRAINING].ranking
    assert ranking is not None
    assert ranking.known == 6


def test_training_and_held_out_data_are_compared_by_ids(tmp_path: Path) -> None:
    held_out = (
        TokenizedGroup(prompt=ids(9), completions=(GOOD, BAD), pairs=(Pair(0, 1),)),
        TokenizedGroup(prompt=ids(9), completions=(GOOD, BAD), pairs=(Pair(1, 0),)),
        TokenizedGroup(prompt=ids(9, 3), completions=(ids(4, 5), BAD), pairs=(Pair(0, 1),)),
    )
    train, test = number_alike([written(GROUPS, tmp_path / "a"), written(held_out, tmp_path / "b")])
    found = overlap(train, test)
    # The third group's sequence 9 3 4 5 has the ids of the first's, cut at another place: not the same.
    assert (found.prompts, found.pairs, found.reversed_pairs) == (1, 1, 1)


def test_without_any_difference_in_length_there_is_no_share(tmp_path: Path) -> None:
    data = written(GROUPS[-1:], tmp_path / "data")
    facts = data_facts(data, number_alike([data])[0])
    assert facts.longer_chosen is None
    assert (facts.differing, facts.longer_by) == (0, (0.0, 0.0, 0.0))


@settings(max_examples=25, deadline=None)  # every example is flushed to the disk
@given(st.lists(tokenized_groups(), min_size=1, max_size=6), st.integers(0, 3))
def test_every_number_is_that_of_a_plain_loop(groups: list[TokenizedGroup], again: int) -> None:
    groups = [*groups, *groups[:again]]
    with TemporaryDirectory() as folder:
        data = written(groups, Path(folder) / "data")
        facts = data_facts(data, number_alike([data])[0])
        sequences, trees = pair_sequences(data), pair_trees(data, np.arange(len(data.pairs)))
    seen, order = set[object](), []
    for number, group in enumerate(groups):
        for chosen, rejected in group.pairs:
            of_pair = (group.prompt, group.completions[chosen], group.completions[rejected])
            order.append((number, tuple(tuple(part.tolist()) for part in of_pair)))
    first = [0, *accumulate(len(group.completions) for group in groups)]
    flat = [(first[n] + c, first[n] + r) for n, group in enumerate(groups) for c, r in group.pairs]
    assert sequences.tolist() == [list(pair) for pair in flat]
    assert pair_groups(data).tolist() == [number for number, _ in order]
    assert [tuple(tuple(p.tolist()) for p in (prompt, *both)) for prompt, both in trees] == [
        texts for _, texts in order
    ]
    prompts = Counter(prompt for _, (prompt, _, _) in order)
    pairs = {texts for _, texts in order}
    for place, (_, texts) in enumerate(order):
        prompt, chosen, rejected = texts
        assert facts.sharing[place] == (prompts[prompt] > 1)
        assert facts.repeated[place] == (texts in seen)
        assert facts.contradicted[place] == ((prompt, rejected, chosen) in pairs)
        seen.add(texts)
    assert facts.prompts == len({tuple(group.prompt.tolist()) for group in groups})
