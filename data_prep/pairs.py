"""Sampled continuations -> groups with preferences: by score or by the model that wrote them.

Identical continuations of a prompt are merged, blank ones dropped; what makes no pair is counted by reason.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from data_prep.prompts import Prompt
from dpo.data.pairing import PairingRule, pairs_from_scores
from dpo.data.records import Pair, PreferenceGroup

Groups = Iterator[tuple[Prompt, PreferenceGroup]]
Texts = Sequence[Sequence[str]]
Scores = Sequence[Sequence[float]]


def scored_groups(
    prompts: Sequence[Prompt],
    texts: Texts,
    scores: Scores,
    *,
    pairing: PairingRule,
    min_margin: float,
    only_finished: bool,
    drops: Counter[str],
) -> Groups:
    """Groups of one model's continuations, paired by score.

    Args:
        prompts: P prompts.
        texts: Continuations of each; a blank one is left out.
        scores: Of the continuations.
        pairing: As in `pairs_from_scores`.
        min_margin: The same.
        only_finished: Whether blank ones are those that were cut, for the reason of a drop.
        drops: Counts prompts without a pair by reason.
    """
    for number, prompt in enumerate(prompts):
        scored = [pair for pair in zip(texts[number], scores[number], strict=True) if pair[0].strip()]
        score_of = dict(scored)
        pairs = pairs_from_scores(list(score_of.values()), pairing, min_margin) if score_of else ()
        if not pairs:
            few = "identical_continuations"
            if only_finished and sum(1 for text in texts[number] if text.strip()) < 2:
                few = "too_few_finished_continuations"
            drops[few if len(score_of) < 2 else "no_pair_above_margin"] += 1
            continue
        yield (
            prompt,
            PreferenceGroup(
                prompt=prompt.content,
                completions=tuple(score_of),
                pairs=pairs,
                scores=tuple(score_of.values()),
                reference_scores=tuple(score for _, score in scored),  # as often as they were drawn
                id=f"{prompt.split}-{number}",
            ),
        )


def delta_groups(
    prompts: Sequence[Prompt],
    stronger: Texts,
    weaker: Texts,
    scores: tuple[Scores, Scores] | None,
    *,
    min_margin: float,
    drops: Counter[str],
) -> Groups:
    """Groups in which a stronger model's continuation is preferred to a weaker model's (arXiv 2507.06187).

    Args:
        prompts: P prompts.
        stronger: Continuations of each, the chosen ones; blank ones are left out.
        weaker: As many, the rejected ones: the n-th is paired with the stronger model's n-th.
        scores: Of both; a pair is kept where the chosen one scores higher by more than `min_margin`. None:
            all are.
        min_margin: At least 0.
        drops: Counts prompts without a pair by reason.
    """
    for number, prompt in enumerate(prompts):
        chosen, rejected = stronger[number], weaker[number]
        together = [text for text in dict.fromkeys([*chosen, *rejected]) if text.strip()]
        place = {text: index for index, text in enumerate(together)}
        written = [
            index
            for index, (good, bad) in enumerate(zip(chosen, rejected, strict=True))
            if good in place and bad in place and good not in rejected and bad not in chosen
        ]
        score_of: dict[str, float] = {}
        if scores is not None:
            score_of = dict(zip([*chosen, *rejected], [*scores[0][number], *scores[1][number]], strict=True))
            written = [n for n in written if score_of[chosen[n]] - score_of[rejected[n]] > min_margin]
        if not written:
            drops["no_pair_of_both_models"] += 1
            continue
        pairs = dict.fromkeys(Pair(place[chosen[index]], place[rejected[index]]) for index in written)
        yield (
            prompt,
            PreferenceGroup(
                prompt=prompt.content,
                completions=tuple(together),
                pairs=tuple(sorted(pairs)),
                scores=tuple(score_of[text] for text in together) if scores is not None else None,
                id=f"{prompt.split}-{number}",
            ),
        )


def with_balanced_lengths(
    groups: Iterable[tuple[Prompt, PreferenceGroup]], seed: int, drops: Counter[str]
) -> Groups:
    """Drops training pairs until the chosen completion is as often longer as it is shorter, by as much.

    Length then says nothing about which one is preferred. Differences are compared in powers of two; where
    one direction has more pairs of a size, which of them stay follows from the seed.

    Args:
        groups: Of both splits; held-out groups stay as they are.
        seed: Decides which pairs stay.
        drops: Counts pairs and groups that go.
    """
    kept = list(groups)
    sizes: dict[int, tuple[list[tuple[int, Pair]], list[tuple[int, Pair]]]] = defaultdict(lambda: ([], []))
    for number, (prompt, group) in enumerate(kept):
        for pair in group.pairs if prompt.split == "train" else ():
            longer = len(group.completions[pair.chosen]) - len(group.completions[pair.rejected])
            if longer:
                sizes[abs(longer).bit_length()][longer < 0].append((number, pair))
    stream, gone = random.Random(seed), set[tuple[int, Pair]]()
    for size in sorted(sizes):
        fewer, more = sorted(sizes[size], key=len)
        gone |= {*more} - {*stream.sample(more, len(fewer))}
    drops["pair_of_unbalanced_length"] += len(gone)
    for number, (prompt, group) in enumerate(kept):
        pairs = tuple(pair for pair in group.pairs if (number, pair) not in gone)
        if pairs:
            yield prompt, replace(group, pairs=pairs)
        else:
            drops["no_pair_of_balanced_length"] += 1
