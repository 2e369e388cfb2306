"""Preferences with other labels, for controls: what learns from them has to go the other way, or nowhere."""

import hashlib
import random
from dataclasses import replace
from typing import Literal, get_args

from data_prep.splits import prompt_key
from dpo.data.records import Pair, PreferenceGroup

Labels = Literal["given", "flipped", "shuffled"]
LABELS: tuple[Labels, ...] = get_args(Labels)


def relabel(group: PreferenceGroup, labels: Labels, seed: int) -> PreferenceGroup:
    """A group with the same prompt and completions, and other preferences between them.

    Args:
        group: Any.
        labels: given: as it is. flipped: each pair the other way round, scores with the other sign.
            shuffled: scores and ranks are dealt anew among the completions; each deal is equally likely, so
            that a pair keeps its direction as often as not, and the number of pairs stays.
        seed: At least 0. The deal depends on this, the prompt and the completions, not on the row's place.
    """
    if labels == "given":
        return group
    if labels == "flipped":
        return replace(
            group,
            pairs=tuple(Pair(chosen=pair.rejected, rejected=pair.chosen) for pair in group.pairs),
            scores=None if group.scores is None else tuple(-score for score in group.scores),
        )
    content = "\0".join((str(seed), prompt_key(group), *group.completions))
    stream = random.Random(hashlib.blake2b(content.encode("utf-8", "surrogatepass")).digest())
    order = list(range(len(group.completions)))
    stream.shuffle(order)  # completion i is now what completion order[i] was
    place = {was: now for now, was in enumerate(order)}
    return replace(
        group,
        pairs=tuple(Pair(chosen=place[pair.chosen], rejected=place[pair.rejected]) for pair in group.pairs),
        scores=None if group.scores is None else tuple(group.scores[was] for was in order),
    )
