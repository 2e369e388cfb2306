"""Where a policy has learned the preference: by which completion is longer, and by source of the data."""

from collections.abc import Sequence

import numpy as np

from dpo.data.dataset import SourceGroups
from dpo.evaluate.rewards import PairScores
from dpo.evaluate.statistics import mean_interval, ratio_interval


def length_summary(scores: PairScores) -> dict[str, float]:
    """Length bias of the labels and of the policy's rewards, in tokens of the completions.

    Args:
        scores: P pairs with rewards and lengths.

    Returns:
        Over the pairs whose completions differ in length: `length/longer_chosen` (share in which the label
        prefers the longer) and `length/longer_rewarded` (share in which the policy's reward is higher for
        the longer; a tie is half), each with `/low` and `/high`. A policy with a larger share than the labels
        has picked up length. And the accuracy `length/accuracy/longer_chosen` and
        `length/accuracy/shorter_chosen`, over the pairs whose chosen completion is the longer or the shorter
        one. What no pair belongs to is left out.
    """
    difference = scores.chosen_tokens - scores.rejected_tokens
    differ = difference != 0
    found: dict[str, float] = {}
    if differ.any():
        longer_wins = (np.sign(difference * scores.margins) + 1) / 2
        shares = {"longer_chosen": (difference > 0).astype(np.float64), "longer_rewarded": longer_wins}
        for name, values in shares.items():
            found |= mean_interval(values[differ], scores.groups[differ]).under(f"length/{name}")
    for name, chosen in {"longer_chosen": difference > 0, "shorter_chosen": difference < 0}.items():
        if chosen.any():
            accuracy = mean_interval(scores.correct[chosen], scores.groups[chosen])
            found |= accuracy.under(f"length/accuracy/{name}")
    return found


def source_summary(scores: PairScores, sources: Sequence[SourceGroups]) -> dict[str, float]:
    """Accuracy and loss of each source of a mixture; empty where there are fewer than two.

    Args:
        scores: P pairs, numbered by group.
        sources: Of these groups, in their order.

    Returns:
        `source/<name>/accuracy` and `source/<name>/loss`, each with `/low` and `/high`, and
        `source/<name>/pairs`, how many there are. Parts of the same name count together.
    """
    found: dict[str, float] = {}
    names = np.repeat([source.name for source in sources], [source.groups for source in sources])
    for name in dict.fromkeys(names.tolist()) if len({*names.tolist()}) > 1 else ():
        mine = names[scores.groups] == name
        groups = scores.groups[mine]
        found |= mean_interval(scores.correct[mine], groups).under(f"source/{name}/accuracy")
        loss = ratio_interval(scores.losses[mine], scores.units[mine], groups)
        found |= loss.under(f"source/{name}/loss")
        found[f"source/{name}/pairs"] = float(mine.sum())
    return found
