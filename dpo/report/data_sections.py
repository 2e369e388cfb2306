"""What a reader sees of a data set: sections of `dpo data`, and of a run's report.

Pure: takes what `dpo.evaluate.described_data` measured. Which sections there are follows from what is known:
without a reference cache, without held-out data or without CHES scores their sections are left out.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from dpo.data.dataset import TokenizedDataset
from dpo.data.records import plain_ids
from dpo.evaluate.data_facts import pair_trees
from dpo.evaluate.described_data import HELD_OUT, TRAINING, DescribedData
from dpo.evaluate.reference_ranking import FAR, ReferenceRanking
from dpo.evaluate.samples import texts_of
from dpo.evaluate.statistics import Interval
from dpo.report.content import Captioned, PairRow, Section
from dpo.report.figures import histograms

Int64s = npt.NDArray[np.int64]

LISTED = 5
"""Pairs that a section shows as examples."""

NO_RIVALS = "Completions have labels and no rivals: chosen are the desirable ones, rejected the others."
WHY_IT_FALLS = (
    "A preference loss asks only for a wider gap: what the model represents alike in chosen and rejected is "
    "lowered together with the rejected completion, so the chosen log-prob falls too, furthest in the pairs "
    "with the highest CHES score. That is no fault while the margin grows and samples read well; if it is "
    "too much, drop such pairs, or hold the chosen text up with loss.sft_weight."
)
"""The answer to the question of its section, in two sentences."""


def data_sections(
    described: DescribedData, tokenizer: PreTrainedTokenizerBase, *, listed: int = LISTED
) -> list[Section]:
    """All sections that apply, in the order of a page.

    Args:
        described: Training and held-out data.
        tokenizer: The policy's, for the text of listed pairs.
        listed: Pairs that a section shows at most.
    """
    return [
        *_rows(described),
        *_lengths(described),
        *_repetition(described, tokenizer, listed),
        *_reference(described, tokenizer, listed),
        *_ches(described, tokenizer, listed),
    ]


def pair_rows(
    data: TokenizedDataset, pairs: Int64s, measures: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> list[PairRow]:
    """The text of pairs of a data set, and what is said of each."""
    found = []
    for (prompt, (chosen, rejected)), measure in zip(pair_trees(data, pairs), measures, strict=True):
        texts = texts_of([prompt, plain_ids(chosen), plain_ids(rejected)], tokenizer)
        found.append(PairRow(prompt=texts[0], chosen=texts[1], rejected=texts[2], measure=measure))
    return found


def _rows(described: DescribedData) -> Iterator[Section]:
    facts = [split.facts for split in described.splits.values()]
    reasons = dict.fromkeys(reason for one in facts for reason in one.counts)
    labelled = any(sum(one.labels) for one in facts)
    rows = [
        ("pairs and labels" if labelled else "pairs", *(f"{one.pairs:,}" for one in facts)),
        *(
            (f"labelled {name}", *(f"{one.labels[place]:,}" for one in facts))
            for place, name in enumerate(("desirable", "undesirable") if labelled else ())
        ),
        ("groups (a prompt with its completions)", *(f"{one.groups:,}" for one in facts)),
        ("completions", *(f"{one.sequences:,}" for one in facts)),
        ("distinct prompts", *(f"{one.prompts:,}" for one in facts)),
        ("pairs that share their prompt", *(_true(one.sharing) for one in facts)),
        ("tokens", *(f"{one.tree_tokens:,}" for one in facts)),
        (
            "saved by computing a prompt once",
            *(f"{1 - one.tree_tokens / one.row_tokens:.1%}" for one in facts),
        ),
        *((_reason(reason), *(f"{one.counts.get(reason, 0):,}" for one in facts)) for reason in reasons),
    ]
    nothing = [] if reasons else ["Nothing was dropped and nothing was truncated."]
    yield Section(title="Rows", columns=_columns(described), rows=rows, notes=nothing)


def _lengths(described: DescribedData) -> Iterator[Section]:
    facts = [split.facts for split in described.splits.values()]
    rows: list[tuple[str, ...]] = []
    for name in ("prompt", "chosen", "rejected"):
        cells = (_quantiles(getattr(one, f"{name}_tokens")) for one in facts)
        rows.append((f"{name}: median, 95th %, longest", *cells))
    rows.append(("chosen is longer", *(_percent(one.longer_chosen) for one in facts)))
    rows.append(("... of pairs that differ in length", *(f"{one.differing:,}" for one in facts)))
    means = (_interval(one.longer_by) if one.longer_by else "" for one in facts)
    rows.append(("chosen minus rejected, mean", *means))
    train = described.splits[TRAINING].facts
    completions = {"chosen": train.chosen_tokens, "rejected": train.rejected_tokens}
    yield Section(
        title="Lengths in tokens",
        notes=[_length_bias(train.longer_chosen) if train.longer_by else NO_RIVALS],
        columns=_columns(described),
        rows=rows,
        figures=[
            Captioned(
                name="completion_tokens",
                title="Completions: chosen against rejected",
                caption="Tokens of the completions of the training pairs. Where the two differ, a policy can "
                "win by length alone.",
                figure=histograms(
                    {name: tokens for name, tokens in completions.items() if len(tokens)},
                    title="Completion length, chosen against rejected",
                    unit="tokens",
                    counted="training pairs",
                ),
            ),
            Captioned(
                name="prompt_tokens",
                title="Prompts",
                caption="Tokens of the training prompts, after truncation.",
                figure=histograms(
                    {"prompts": train.prompt_tokens},
                    title="Prompt length",
                    unit="tokens",
                    counted="training groups",
                ),
            ),
        ],
    )


def _length_bias(longer: Interval | None) -> str:
    if longer is None:
        return "Chosen and rejected completions have the same lengths."
    if longer.low <= 0.5 <= longer.high:
        return "The labels do not prefer a length: the interval of the share contains one half."
    kind = "longer" if longer.mean > 0.5 else "shorter"
    return (
        f"The labels prefer the {kind} completion in {max(longer.mean, 1 - longer.mean):.0%} of the pairs: a "
        f"policy is rewarded for writing {kind} text. Compare lengths before and after training (loss.type "
        "simpo and sigmoid_norm divide by length)."
    )


def _repetition(
    described: DescribedData, tokenizer: PreTrainedTokenizerBase, listed: int
) -> Iterator[Section]:
    facts = [split.facts for split in described.splits.values()]
    rows = [
        ("pairs that repeat an earlier one", *(_true(one.repeated) for one in facts)),
        ("pairs that stand in both orders", *(_true(one.contradicted) for one in facts)),
    ]
    both = described.overlap
    if both is not None:
        held_out = described.splits[HELD_OUT].facts
        rows += [
            ("prompts that training has too", "", _part(both.prompts, held_out.prompts)),
            ("pairs that training has too", "", _part(both.pairs, held_out.pairs)),
            ("... in the other order", "", _part(both.reversed_pairs, held_out.pairs)),
        ]
    notes = []
    if both is not None and both.prompts:
        notes.append("Held-out prompts were trained on: held-out metrics look better than they are.")
    train = described.splits[TRAINING]
    against = np.flatnonzero(train.facts.contradicted)[:listed]
    if len(against):
        notes.append("The pairs below stand in the training data in both orders; they cancel each other.")
    yield Section(
        title="Repetition and contradiction",
        notes=notes,
        columns=_columns(described),
        rows=rows,
        measure="pair",
        pairs=pair_rows(train.data, against, [f"#{pair}" for pair in against], tokenizer),
    )


def _reference(
    described: DescribedData, tokenizer: PreTrainedTokenizerBase, listed: int
) -> Iterator[Section]:
    rankings = [split.ranking for split in described.splits.values()]
    if not any(rankings):
        return

    def row(label: str, cell: Callable[[ReferenceRanking], str]) -> tuple[str, ...]:
        return (label, *("-" if ranking is None else cell(ranking) for ranking in rankings))

    train, pairs = described.splits[TRAINING], []
    if train.ranking is not None:
        suspects = train.ranking.suspects[:listed]
        measures = [f"{margin:+.1f}" for margin in train.ranking.margins[suspects]]
        pairs = pair_rows(train.data, suspects, measures, tokenizer)
    yield Section(
        title="What the reference thinks of the labels",
        notes=[
            f"Suspected flips are pairs that the reference ranks wrong by more than {FAR:g} standard "
            "deviations of all margins, and wrong per token, too. The reference knows what is likely, not "
            "what is better: read them before you drop any."
        ],
        columns=_columns(described),
        rows=[
            row("pairs in the reference cache", lambda of: _part(of.known, len(of.margins))),
            row("ranked right", lambda of: _percent(of.right)),
            row("ranked right per token", lambda of: _percent(of.right_per_token)),
            row("suspected flips", lambda of: _part(len(of.suspects), of.known)),
        ],
        measure="margin, nats",
        pairs=pairs,
    )


def _ches(described: DescribedData, tokenizer: PreTrainedTokenizerBase, listed: int) -> Iterator[Section]:
    ches = described.ches
    if ches is None:
        return
    worst = np.argsort(-ches.per_token, kind="stable")[:listed]
    measures = [f"{score:.3g}" for score in ches.per_token[worst]]
    yield Section(
        title="Why does the chosen log-prob fall?",
        notes=[
            WHY_IT_FALLS,
            f"In these {len(ches.pairs):,} training pairs the median likeness is "
            f"{np.median(ches.likeness):.2f}: 1 where the model represents both completions alike, 0 where "
            "they have nothing in common.",
        ],
        columns=("CHES (arXiv 2410.08847)", "5th %", "median", "95th %"),
        rows=[
            ("score", *_spread(ches.scores)),
            ("length-normalised score", *_spread(ches.per_token)),
            ("likeness of chosen and rejected", *_spread(ches.likeness)),
        ],
        measure="CHES/token",
        pairs=pair_rows(described.splits[TRAINING].data, ches.pairs[worst], measures, tokenizer),
    )


def _columns(described: DescribedData) -> list[str]:
    return ["", *described.splits]


def _reason(reason: str) -> str:
    kind, _, what = reason.partition("/")
    return f"{kind}: {what.replace('_', ' ')}"


def _part(number: int, total: int) -> str:
    return f"{number:,} ({number / total:.1%})"


def _true(values: npt.NDArray[np.bool_]) -> str:
    return _part(int(values.sum()), len(values))


def _percent(share: Interval | None) -> str:
    return "-" if share is None else f"{share.mean:.1%} [{share.low:.1%}, {share.high:.1%}]"


def _interval(mean: Interval) -> str:
    return f"{mean.mean:+.1f} [{mean.low:+.1f}, {mean.high:+.1f}]"


def _quantiles(tokens: Int64s) -> str:
    if not len(tokens):
        return ""
    median, high = np.quantile(tokens, [0.5, 0.95])
    return f"{median:,.0f}, {high:,.0f}, {tokens.max():,}"


def _spread(values: npt.NDArray[np.float64]) -> list[str]:
    return [f"{value:.4g}" for value in np.quantile(values, [0.05, 0.5, 0.95])]
