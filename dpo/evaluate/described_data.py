"""A training set and its held-out set, described together: what `dpo data` and a run's report show.

Pure: takes data sets in token ids, and what the reference cache knows of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo.data.dataset import TokenizedDataset
from dpo.evaluate.ches import ChesScores
from dpo.evaluate.data_facts import DataFacts, Overlap, data_facts, number_alike, overlap, pair_groups
from dpo.evaluate.reference_ranking import ReferenceRanking, reference_ranking

Float64s = npt.NDArray[np.float64]

TRAINING, HELD_OUT = "training", "held-out"


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedSplit:
    """One data set and what is known of it."""

    data: TokenizedDataset
    facts: DataFacts
    ranking: ReferenceRanking | None
    """None where the reference cache has none of its pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedData:
    """Both data sets."""

    splits: Mapping[str, DescribedSplit]
    """`TRAINING`, and `HELD_OUT` where there is held-out data."""
    overlap: Overlap | None
    """None without held-out data."""
    ches: ChesScores | None = None
    """Of a sample of the training pairs; None where nobody asked for it."""

    def summary(self) -> dict[str, float]:
        """The numbers under flat names, for scripts; an interval is `<name>/low` and `<name>/high`."""
        found: dict[str, float] = {}
        for name, split in self.splits.items():
            found |= {f"{name}/{key}": value for key, value in _numbers(split).items()}
        if self.overlap is not None:
            found["overlap/prompts"] = self.overlap.prompts
            found["overlap/pairs"] = self.overlap.pairs
            found["overlap/reversed_pairs"] = self.overlap.reversed_pairs
        if self.ches is not None:
            found["ches/pairs"] = len(self.ches.pairs)
            found["ches/median"] = float(np.median(self.ches.scores))
            found["ches/per_token/median"] = float(np.median(self.ches.per_token))
            found["ches/likeness/median"] = float(np.median(self.ches.likeness))
        return found


def describe(
    datasets: Mapping[str, TokenizedDataset],
    logps: Mapping[str, Float64s],
    ches: ChesScores | None = None,
) -> DescribedData:
    """Describes training and held-out data.

    Args:
        datasets: Under `TRAINING`, and `HELD_OUT` where there is held-out data.
        logps: Of the same names, (S,) reference log-probs in nats with NaN where not known; a data set that
            is not named is not ranked.
        ches: Of a sample of the training pairs.
    """
    numbered = dict(zip(datasets, number_alike([*datasets.values()]), strict=True))
    splits = {}
    for name, data in datasets.items():
        prompts = numbered[name].prompts[pair_groups(data)]
        splits[name] = DescribedSplit(
            data=data,
            facts=data_facts(data, numbered[name]),
            ranking=reference_ranking(data, logps[name], prompts) if name in logps else None,
        )
    both = overlap(numbered[TRAINING], numbered[HELD_OUT]) if HELD_OUT in numbered else None
    return DescribedData(splits=splits, overlap=both, ches=ches)


def _numbers(split: DescribedSplit) -> dict[str, float]:
    facts, ranking = split.facts, split.ranking
    found: dict[str, float] = {
        "groups": facts.groups,
        "pairs": facts.pairs,
        "prompts": facts.prompts,
        "completions": facts.sequences,
        "tokens": facts.tree_tokens,
        **facts.counts,
        "pairs_sharing_a_prompt": float(facts.sharing.mean()),
        "pairs_repeated": int(facts.repeated.sum()),
        "pairs_contradicted": int(facts.contradicted.sum()),
    }
    if sum(facts.labels):
        found |= {"labels/desirable": facts.labels[0], "labels/undesirable": facts.labels[1]}
    if facts.longer_by is not None:
        found |= facts.longer_by.under("length/longer_by")
    if facts.longer_chosen is not None:
        found |= facts.longer_chosen.under("length/longer_chosen")
    if ranking is not None:
        found |= {"reference/known_pairs": ranking.known, "reference/suspects": len(ranking.suspects)}
        found |= ranking.right.under("reference/right")
        found |= ranking.right_per_token.under("reference/right_per_token")
    return found
