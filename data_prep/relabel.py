"""Preferences with changed labels, for control experiments: flipped, or shuffled among the completions.

A policy trained on flipped labels must move the other way, and one trained on shuffled labels must not
improve.
"""

import hashlib
import random
from dataclasses import replace
from typing import Literal, get_args

from data_prep.splits import prompt_key
from dpo.data.records import NO_RIVAL, Pair, PreferenceGroup

Labels = Literal["given", "flipped", "shuffled"]
LABELS: tuple[Labels, ...] = get_args(Labels)


def relabel(group: PreferenceGroup, labels: Labels, seed: int) -> PreferenceGroup:
    """A group with the same prompt and completions, and other preferences between them.

    Args:
        group: Any group.
        labels: given: the group itself. flipped: chosen and rejected are exchanged in each pair, and scores
            change their sign. shuffled: scores and ranks are permuted among the completions, each permutation
            equally likely, so that a pair keeps its direction half of the time; the number of pairs stays.
        seed: At least 0. The permutation depends on it, the prompt and the completions, not on other rows.
    """
    if labels == "given":
        return group
    if labels == "flipped":
        return replace(
            group,
            pairs=tuple(Pair(chosen=pair.rejected, rejected=pair.chosen) for pair in group.pairs),
            scores=_negative(group.scores),
            reference_scores=_negative(group.reference_scores),
        )
    content = "\0".join((str(seed), prompt_key(group), *group.completions))
    stream = random.Random(hashlib.blake2b(content.encode("utf-8", "surrogatepass")).digest())
    order = list(range(len(group.completions)))
    stream.shuffle(order)  # completion i gets the score and rank of completion order[i]
    place = {was: now for now, was in enumerate(order)} | {NO_RIVAL: NO_RIVAL}
    return replace(
        group,
        pairs=tuple(Pair(chosen=place[pair.chosen], rejected=place[pair.rejected]) for pair in group.pairs),
        scores=None if group.scores is None else tuple(group.scores[was] for was in order),
    )


def _negative(scores: tuple[float, ...] | None) -> tuple[float, ...] | None:
    return None if scores is None else tuple(-score for score in scores)
