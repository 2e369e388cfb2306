"""Which sampled continuations become pairs: by score, by model, and balanced by length."""

from collections import Counter

import numpy as np

from data_prep.pairs import delta_groups, scored_groups, with_balanced_lengths
from data_prep.prompts import Prompt
from dpo.data.records import Pair, PreferenceGroup


def test_identical_and_blank_continuations_are_dropped_and_groups_without_a_pair_are_counted() -> None:
    prompts = [Prompt("train", "p"), Prompt("train", "q"), Prompt("test", "r"), Prompt("test", "s")]
    texts = [["a", "b", "a", " "], ["a", "a", "", "a"], ["a", "b", "c", "d"], [" ", "", "", " "]]
    scores = [[0.5, 0.1, 0.5, 0.0], [0.5, 0.5, 0.0, 0.5], [0.1, 0.2, 0.3, 0.15], [0.0, 0.0, 0.0, 0.0]]
    drops: Counter[str] = Counter()
    groups = list(
        scored_groups(
            prompts, texts, scores, pairing="best-vs-rest", min_margin=0.2, only_finished=False, drops=drops
        )
    )
    assert groups == [
        (
            prompts[0],
            PreferenceGroup(
                prompt="p",
                completions=("a", "b"),
                pairs=(Pair(0, 1),),
                scores=(0.5, 0.1),
                reference_scores=(0.5, 0.1, 0.5),
                id="train-0",
            ),
        )
    ]
    assert drops == {"identical_continuations": 2, "no_pair_above_margin": 1}


def test_the_stronger_models_continuation_is_chosen_whatever_it_says() -> None:
    prompts = [Prompt("train", "p"), Prompt("test", "q"), Prompt("train", "r")]
    stronger = [["a", "b", "b"], ["c", " ", "d"], ["e", "f", "g"]]
    weaker = [["x", "y", "y"], ["w", "z", "c"], ["g", "", "e"]]
    drops: Counter[str] = Counter()
    groups = [*delta_groups(prompts, stronger, weaker, None, min_margin=0.0, drops=drops)]
    assert [prompt for prompt, _ in groups] == prompts[:1]
    (_, first), *_ = groups
    assert first.completions == ("a", "b", "x", "y")
    assert first.pairs == (Pair(0, 2), Pair(1, 3))
    assert first.scores is None
    # of q, c is both models', and the others are blank or with it; of r, e and g are
    assert drops == {"no_pair_of_both_models": 2}


def test_with_scores_a_pair_of_two_models_must_agree_with_them() -> None:
    prompts = [Prompt("train", "p")]
    scores = ([[1.0, 0.5, 0.0]], [[0.5, 0.4, 0.3]])
    texts = [["a", "b", "c"]], [["x", "y", "z"]]
    (found,) = delta_groups(prompts, *texts, scores, min_margin=0.2, drops=Counter())
    assert found[1].pairs == (Pair(0, 3),)
    assert found[1].scores == (1.0, 0.5, 0.0, 0.5, 0.4, 0.3)


def test_balanced_lengths_say_nothing_about_the_preference() -> None:
    rng = np.random.default_rng(0)
    groups = []
    for number in range(400):  # the chosen one is longer in nine of ten
        short, long = sorted(int(length) for length in rng.integers(1, 60, 2))
        texts = ("x" * long, "y" * short) if rng.random() < 0.9 else ("x" * short, "y" * long)
        group = PreferenceGroup(prompt=str(number), completions=texts, pairs=(Pair(0, 1),))
        groups.append((Prompt("train" if number % 4 else "test", str(number)), group))
    drops: Counter[str] = Counter()
    kept = [*with_balanced_lengths(groups, 0, drops)]
    again = [*with_balanced_lengths(groups, 0, Counter())]
    assert kept == again
    assert kept != [*with_balanced_lengths(groups, 1, Counter())]
    train = [group for prompt, group in kept if prompt.split == "train"]
    longer = [len(group.completions[0]) - len(group.completions[1]) for group in train]
    assert sum(np.sign(longer)) == 0
    assert abs(np.mean(longer)) < 2
    assert len(train) >= 40
    assert sum(prompt.split == "test" for prompt, _ in kept) == 100
    assert drops["pair_of_unbalanced_length"] == drops["no_pair_of_balanced_length"] == 300 - len(train)


def test_a_group_keeps_its_other_pairs_and_equal_lengths_are_balanced() -> None:
    group = PreferenceGroup(
        prompt="p", completions=("aaaa", "bb", "cccc", "dddddd"), pairs=(Pair(0, 1), Pair(0, 2), Pair(0, 3))
    )
    (kept,) = with_balanced_lengths([(Prompt("train", "p"), group)], 0, Counter())
    assert kept[1] == group  # 2 longer, the same, 2 shorter
    more = PreferenceGroup(prompt="q", completions=("eee", "f"), pairs=(Pair(0, 1),))
    drops: Counter[str] = Counter()
    found = [*with_balanced_lengths([(Prompt("train", "p"), group), (Prompt("train", "q"), more)], 0, drops)]
    assert sum(len(one.pairs) for _, one in found) == 3
    assert drops["pair_of_unbalanced_length"] == 1
