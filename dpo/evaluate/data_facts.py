"""What a data set of preferences holds, before any model sees it: lengths, sharing, contradictions.

Pure functions on the arrays of `TokenizedDataset`; memory and time grow with rows, and no group is built.
Prompts and sequences are equal where their token ids are.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dpo.data.dataset import TokenizedDataset
from dpo.data.records import KEY_BYTES, NO_RIVAL
from dpo.data.trees import Tree
from dpo.evaluate.statistics import Interval, mean_by_cluster, share_by_cluster

Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataFacts:
    """A data set of G groups, S sequences and P pairs, described."""

    groups: int
    pairs: int
    """P, labelled completions among them."""
    labels: tuple[int, int]
    """Completions that are labelled desirable and undesirable, in place of pairs."""
    counts: dict[str, int]
    """What was dropped and truncated on the way here, by reason, as `dropped/...` and `truncated/...`."""
    prompts: int
    """Distinct prompts."""
    prompt_tokens: Int64s
    """(G,) tokens of each prompt."""
    chosen_tokens: Int64s
    """Tokens of each pair's chosen completion, and of each desirable one."""
    rejected_tokens: Int64s
    tree_tokens: int
    """Tokens of all groups, each prompt once."""
    row_tokens: int
    """Tokens of all sequences, each with its own copy of the prompt."""
    sequences: int
    sharing: Bools
    """(P,) whether the pair's prompt is also that of another pair."""
    repeated: Bools
    """(P,) whether an earlier pair has the same prompt and completions in the same order."""
    contradicted: Bools
    """(P,) whether some pair has the same prompt and completions in the other order."""
    longer_chosen: Interval | None
    """Share of pairs whose chosen completion is the longer one, of those that differ in length; None if none
    does."""
    differing: int
    """Pairs whose completions differ in length."""
    longer_by: Interval | None
    """Mean tokens of the chosen completion minus those of the rejected one; None without pairs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """What training and held-out data have in common."""

    prompts: int
    """Distinct held-out prompts that training has too."""
    pairs: int
    """Held-out pairs that training has too, in the same order."""
    reversed_pairs: int
    """Held-out pairs that training has in the other order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbered:
    """The prompts and pairs of a data set as numbers that are equal where the token ids are."""

    prompts: Int64s
    """(G,) of each group's prompt."""
    pairs: Int64s
    """(P,) of (chosen, rejected)."""
    reversed_pairs: Int64s
    """(P,) of (rejected, chosen)."""


def pair_groups(dataset: TokenizedDataset) -> Int64s:
    """(P,) the group of each pair."""
    return np.repeat(np.arange(len(dataset)), dataset.pairs_per_group)


def pair_sequences(dataset: TokenizedDataset) -> Int64s:
    """(P, 2) the sequences of the chosen and of the rejected completion, `NO_RIVAL` for a missing side."""
    first = np.repeat(dataset.first_sequence, dataset.pairs_per_group)
    missing = dataset.pairs == NO_RIVAL
    return np.where(missing, NO_RIVAL, first[:, None] + dataset.pairs).astype(np.int64)


def pair_tokens(dataset: TokenizedDataset) -> Int64s:
    """(P, 2) tokens of the chosen and of the rejected completion, 0 for a missing side."""
    sequences = pair_sequences(dataset)
    return np.where(sequences == NO_RIVAL, 0, dataset.completion_tokens[sequences])


def pair_trees(dataset: TokenizedDataset, pairs: Int64s) -> list[Tree]:
    """The prompt, the chosen and the rejected completion of each of these pairs; empty for a missing side."""
    found: list[Tree] = []
    groups = np.searchsorted(dataset.group_pairs, pairs, side="right") - 1
    for pair, number in zip(pairs.tolist(), groups.tolist(), strict=True):
        group = dataset[number]
        sides = group.pairs[pair - int(dataset.group_pairs[number])]
        nothing = group.prompt[:0]
        found.append(
            (group.prompt, [nothing if side == NO_RIVAL else group.completions[side] for side in sides])
        )
    return found


def number_alike(datasets: Sequence[TokenizedDataset]) -> list[Numbered]:
    """Numbers the prompts and pairs of several data sets together, so that they can be compared."""
    prompts = _numbers_of([_prompt_keys(dataset) for dataset in datasets])
    sequences = _numbers_of([dataset.keys for dataset in datasets])
    distinct = 2 + max((int(numbers.max(initial=-1)) for numbers in sequences), default=-1)
    found = []
    for dataset, of_groups, of_sequences in zip(datasets, prompts, sequences, strict=True):
        named = pair_sequences(dataset)
        chosen, rejected = np.where(named == NO_RIVAL, distinct - 1, of_sequences[named]).T
        found.append(
            Numbered(
                prompts=of_groups,
                pairs=chosen * distinct + rejected,
                reversed_pairs=rejected * distinct + chosen,
            )
        )
    return found


def data_facts(dataset: TokenizedDataset, numbered: Numbered) -> DataFacts:
    """Describes a data set.

    Args:
        dataset: G groups, at least one.
        numbered: Of this data set, from `number_alike`.
    """
    tokens, has_rivals = pair_tokens(dataset), dataset.has_rivals
    prompts = numbered.prompts[pair_groups(dataset)]
    pairs_of_prompt = np.bincount(prompts)
    longer, prompts_of_rivals = (tokens[:, 0] - tokens[:, 1])[has_rivals], prompts[has_rivals]
    differs = longer != 0
    _, first = np.unique(numbered.pairs, return_index=True)
    named = np.zeros(len(dataset.keys), dtype=bool)  # those of other prompts, for a loss, are in no pair
    named[pair_sequences(dataset)[dataset.pairs != NO_RIVAL]] = True
    repeated = np.ones(len(tokens), dtype=bool)
    repeated[first] = False
    return DataFacts(
        groups=len(dataset),
        pairs=len(tokens),
        labels=(int((tokens[~has_rivals, 0] > 0).sum()), int((tokens[~has_rivals, 1] > 0).sum())),
        counts={
            name: number
            for name, number in dataset.counts.items()
            if number and name.startswith(("dropped/", "truncated/"))
        },
        prompts=int((np.bincount(numbered.prompts) > 0).sum()),
        prompt_tokens=np.diff(dataset.segment_offsets)[dataset.group_segments[:-1]],
        chosen_tokens=tokens[tokens[:, 0] > 0, 0],
        rejected_tokens=tokens[tokens[:, 1] > 0, 1],
        tree_tokens=int(dataset.tree_tokens.sum() - dataset.completion_lengths[~named].sum()),
        row_tokens=int(dataset.sequence_tokens[named].sum()),
        sequences=int(named.sum()),
        sharing=pairs_of_prompt[prompts] > 1,
        repeated=repeated,
        contradicted=np.isin(numbered.pairs, numbered.reversed_pairs),
        longer_chosen=(
            share_by_cluster(longer[differs] > 0, prompts_of_rivals[differs]) if differs.any() else None
        ),
        differing=int(differs.sum()),
        longer_by=mean_by_cluster(longer, prompts_of_rivals) if len(longer) else None,
    )


def overlap(train: Numbered, held_out: Numbered) -> Overlap:
    """What two data sets have in common; both from one call of `number_alike`."""
    return Overlap(
        prompts=len(np.intersect1d(train.prompts, held_out.prompts)),
        pairs=int(np.isin(held_out.pairs, train.pairs).sum()),
        reversed_pairs=int(np.isin(held_out.pairs, train.reversed_pairs).sum()),
    )


def _prompt_keys(dataset: TokenizedDataset) -> npt.NDArray[np.void]:
    """(G,) V16: the BLAKE2b of each prompt's ids. Reads the mapped tokens once, in order."""
    view = dataset.tokens.data.cast("B")
    size = dataset.tokens.dtype.itemsize
    starts = (size * dataset.segment_offsets[dataset.group_segments[:-1]]).tolist()
    ends = (size * dataset.segment_offsets[dataset.group_segments[:-1] + 1]).tolist()
    digests = b"".join(
        hashlib.blake2b(view[start:end], digest_size=KEY_BYTES).digest()
        for start, end in zip(starts, ends, strict=True)
    )
    return np.frombuffer(digests, dtype=f"V{KEY_BYTES}")


def _numbers_of(parts: Sequence[npt.NDArray[np.void]]) -> list[Int64s]:
    """Each part's keys as integers from 0 that are equal where the keys are, over all parts."""
    keys = np.concatenate([np.ascontiguousarray(part) for part in parts])
    halves = keys.view(np.uint64).reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    in_order = halves[order]
    is_new = np.ones(len(keys), dtype=np.int64)
    is_new[1:] = (in_order[1:] != in_order[:-1]).any(axis=1)
    numbers = np.empty(len(keys), dtype=np.int64)
    numbers[order] = np.cumsum(is_new) - 1
    return np.split(numbers, np.cumsum([len(part) for part in parts])[:-1])
