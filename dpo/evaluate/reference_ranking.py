"""How the reference model ranks the pairs of a data set, and which labels look flipped.

A pair that the reference ranks far the wrong way, in total and per token, is often a swapped or a broken row.
It is a suspicion: the reference knows what text is likely, not what people prefer.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo.data.dataset import TokenizedDataset
from dpo.data.records import NO_RIVAL
from dpo.evaluate.data_facts import pair_sequences, pair_tokens
from dpo.evaluate.statistics import Interval, share_by_cluster

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]

FAR = 2.0
"""Standard deviations of all margins beyond which a wrong ranking is far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRanking:
    """The reference's view of P pairs, K of which are in its cache."""

    known: int
    """K, pairs whose two completions are in the cache; at least 1."""
    margins: Float64s
    """(P,) log-prob of the chosen minus that of the rejected completion, in nats; NaN where not known."""
    per_token: Float64s
    """(P,) the same of the log-probs per token."""
    right: Interval
    """Share of known pairs whose chosen completion has the higher log-prob."""
    right_per_token: Interval
    """Share of known pairs whose chosen completion has the higher log-prob per token."""
    limit: float
    """Margin in nats below which a wrong ranking is far: -`FAR` standard deviations."""
    suspects: Int64s
    """Numbers of the pairs that are far wrong in total and wrong per token, the worst first."""


def reference_ranking(
    dataset: TokenizedDataset, logps: Float64s, prompts: npt.NDArray[np.int64]
) -> ReferenceRanking | None:
    """How the reference ranks the pairs; None where its cache has none of them.

    Args:
        dataset: Groups in token ids, with P pairs.
        logps: (S,) log-probs of the sequences under the reference in nats, NaN where not known.
        prompts: (P,) number of each pair's prompt, from 0.
    """
    sequences = pair_sequences(dataset)
    of_pairs = np.where(sequences == NO_RIVAL, np.nan, logps[sequences])
    tokens = pair_tokens(dataset).clip(min=1)
    margins = of_pairs[:, 0] - of_pairs[:, 1]
    per_token = of_pairs[:, 0] / tokens[:, 0] - of_pairs[:, 1] / tokens[:, 1]
    known = np.isfinite(margins)
    if not known.any():
        return None
    limit = -FAR * float(margins[known].std())
    wrong = np.flatnonzero(known & (margins < limit) & (per_token < 0))
    return ReferenceRanking(
        known=int(known.sum()),
        margins=margins,
        per_token=per_token,
        right=share_by_cluster(margins[known] > 0, prompts[known]),
        right_per_token=share_by_cluster(per_token[known] > 0, prompts[known]),
        limit=limit,
        suspects=wrong[np.argsort(margins[wrong], kind="stable")],
    )
