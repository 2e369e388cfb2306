from collections import Counter
from itertools import permutations

from data_prep.relabel import relabel
from dpo.data.pairing import pairs_from_scores
from dpo.data.records import Pair, PreferenceGroup

SCORES = (0.1, 0.9, 0.4)


def _group(number: int = 0) -> PreferenceGroup:
    return PreferenceGroup(
        prompt=f"p{number}",
        completions=("low", "high", "middle"),
        pairs=pairs_from_scores(SCORES, "best-vs-rest"),
        scores=SCORES,
    )


def test_given_labels_stay() -> None:
    assert relabel(_group(), "given", 0) == _group()


def test_flipped_pairs_agree_with_their_flipped_scores() -> None:
    flipped = relabel(_group(), "flipped", 0)
    assert flipped.pairs == (Pair(0, 1), Pair(2, 1))
    assert flipped.scores == (-0.1, -0.9, -0.4)
    assert relabel(flipped, "flipped", 0) == _group()


def test_shuffled_pairs_agree_with_the_shuffled_scores_and_orders_are_equally_likely() -> None:
    deals: Counter[tuple[float, ...]] = Counter()
    for number in range(1200):
        shuffled = relabel(_group(number), "shuffled", 0)
        assert shuffled.scores is not None
        assert shuffled.completions == _group().completions
        assert sorted(shuffled.pairs) == sorted(pairs_from_scores(shuffled.scores, "best-vs-rest"))
        deals[shuffled.scores] += 1
    assert set(deals) == set(permutations(SCORES))
    assert all(140 < count < 260 for count in deals.values())  # 200 expected, standard deviation 12.9


def test_a_shuffle_depends_only_on_seed_and_content() -> None:
    groups = [_group(number) for number in range(50)]
    first, again, other = ([relabel(group, "shuffled", seed) for group in groups] for seed in (0, 0, 1))
    assert first == again != other


def test_pairs_without_scores_are_shuffled_too() -> None:
    pair = PreferenceGroup(prompt="p", completions=("a", "b"), pairs=(Pair(0, 1),))
    seen = {relabel(pair, "shuffled", seed).pairs for seed in range(20)}
    assert seen == {(Pair(0, 1),), (Pair(1, 0),)}
