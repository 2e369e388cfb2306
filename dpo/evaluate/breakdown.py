"""Metrics of the held-out pairs with intervals: overall, by which completion is longer, and by data source.

Pure functions of one value per pair (`PairScores`); intervals count whole prompts, and every share comes with
the number of its pairs.
"""

from collections.abc import Sequence

import numpy as np

from dpo.data.notes import SourceGroups
from dpo.evaluate.rewards import Float64s, PairScores
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
    found |= mean_interval(margin_parts(scores), scores.groups).under("eval/rewards/margins")
    return found | length_summary(scores) | source_summary(scores, sources)


def margin_parts(scores: PairScores) -> Float64s:
    """(P,) values whose mean is that of the margins, and whose spread is that of their estimate.

    Without rivals the margin is a difference of two means over different completions, and each adds its
    distance from the mean of its label, times P over the number of its label.
    """
    if scores.has_rivals.any():
        return scores.margins
    chosen, rejected = scores.has_chosen, scores.has_rejected
    of_label = np.where(chosen, scores.chosen_rewards, scores.rejected_rewards)
    means = np.where(chosen, of_label[chosen].mean(), of_label[rejected].mean())
    spread = np.where(chosen, 1 / chosen.sum(), -1 / rejected.sum()) * len(chosen) * (of_label - means)
    return np.asarray(of_label[chosen].mean() - of_label[rejected].mean() + spread)


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
    differ = (difference != 0) & scores.has_rivals
    found: dict[str, float] = {}
    if differ.any():
        longer_wins = np.where(difference > 0, scores.correct, 1 - scores.correct)
        shares = {"longer_chosen": (difference > 0).astype(np.float64), "longer_rewarded": longer_wins}
        for name, values in shares.items():
            found |= share_by_cluster(values[differ], scores.groups[differ]).under(f"length/{name}")
        found["length/pairs"] = float(differ.sum())
    sides = {"longer_chosen": differ & (difference > 0), "shorter_chosen": differ & (difference < 0)}
    for name, chosen in sides.items():
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
