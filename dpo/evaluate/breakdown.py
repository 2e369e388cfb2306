"""Metrics of the held-out pairs with intervals: overall, by which completion is longer, and by data source.

Pure functions of one value per pair (`PairScores`); intervals count whole prompts, and every share comes with
the number of its pairs.
"""

from collections.abc import Sequence

import numpy as np

from dpo.data.dataset import SourceGroups
from dpo.evaluate.rewards import PairScores
from dpo.evaluate.statistics import mean_interval, ratio_interval, share_by_cluster


def pair_summary(scores: PairScores, sources: Sequence[SourceGroups]) -> dict[str, float]:
    """All metrics of the held-out pairs: those that training logs, with intervals, then the two breakdowns.

    Args:
        scores: P pairs, numbered by group.
        sources: Sources of these groups, in their order.
    """
    found = scores.means() | scores.counts()
    found |= ratio_interval(scores.losses, scores.units, scores.groups).under("eval/loss")
    found |= share_by_cluster(scores.correct, scores.groups).under("eval/rewards/accuracies")
    found |= mean_interval(scores.margins, scores.groups).under("eval/rewards/margins")
    return found | length_summary(scores) | source_summary(scores, sources)


def length_summary(scores: PairScores) -> dict[str, float]:
    """Length bias of the labels and of the policy's rewards, in tokens of the completions.

    Args:
        scores: P pairs with rewards and lengths.

    Returns:
        Over the pairs whose completions differ in length: `length/longer_chosen` (the share of pairs in which
        the label prefers the longer completion) and `length/longer_rewarded` (the share in which the policy's
        reward is higher for the longer one; a tie counts half), each with `/low` and `/high`. If the policy's
        share is larger than the labels', it has learned to prefer length. And the accuracy
        `length/accuracy/longer_chosen` and `length/accuracy/shorter_chosen`, over the pairs whose chosen
        completion is the longer or the shorter one. Each with the number of its pairs, `length/pairs` and
        `length/accuracy/<name>/pairs`. Metrics without any pair are left out.
    """
    difference = scores.chosen_tokens - scores.rejected_tokens
    differ = difference != 0
    found: dict[str, float] = {}
    if differ.any():
        longer_wins = np.where(difference > 0, scores.correct, 1 - scores.correct)
        shares = {"longer_chosen": (difference > 0).astype(np.float64), "longer_rewarded": longer_wins}
        for name, values in shares.items():
            found |= share_by_cluster(values[differ], scores.groups[differ]).under(f"length/{name}")
        found["length/pairs"] = float(differ.sum())
    for name, chosen in {"longer_chosen": difference > 0, "shorter_chosen": difference < 0}.items():
        if chosen.any():
            accuracy = share_by_cluster(scores.correct[chosen], scores.groups[chosen])
            found |= accuracy.under(f"length/accuracy/{name}")
            found[f"length/accuracy/{name}/pairs"] = float(chosen.sum())
    return found


def source_summary(scores: PairScores, sources: Sequence[SourceGroups]) -> dict[str, float]:
    """Accuracy and loss for each source of a mixture; empty if there are fewer than two sources.

    Args:
        scores: P pairs, numbered by group.
        sources: Sources of these groups, in their order.

    Returns:
        `source/<name>/accuracy` and `source/<name>/loss`, each with `/low` and `/high`, and
        `source/<name>/pairs`, the number of pairs. Sources of the same name count together.
    """
    found: dict[str, float] = {}
    names = np.repeat([source.name for source in sources], [source.groups for source in sources])
    for name in dict.fromkeys(names.tolist()) if len({*names.tolist()}) > 1 else ():
        mine = names[scores.groups] == name
        groups = scores.groups[mine]
        found |= share_by_cluster(scores.correct[mine], groups).under(f"source/{name}/accuracy")
        loss = ratio_interval(scores.losses[mine], scores.units[mine], groups)
        found |= loss.under(f"source/{name}/loss")
        found[f"source/{name}/pairs"] = float(mine.sum())
    return found
