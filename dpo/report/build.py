"""From measurement to report: the rows, the figures and the worst cases of an evaluation.

Pure: it takes what `dpo.evaluate` measured and decides what a reader sees of it, in `content` records.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo.data.dataset import TokenizedDataset
from dpo.evaluate.breakdown import pair_summary
from dpo.evaluate.rewards import PairScores
from dpo.evaluate.samples import ComparedSamples
from dpo.report.content import Captioned, PairRow, Provenance, Report, SampleRow, Section
from dpo.report.data_sections import pair_rows
from dpo.report.figures import (
    Point,
    histogram_before_and_after,
    losses_and_margins,
    rewards_over_steps,
    score_against_kl,
)
from dpo.tracking.history import Line

WORST = 3
"""Pairs and samples that the report shows as failures."""


def compose(
    scores: PairScores,
    samples: ComparedSamples | None,
    *,
    data: TokenizedDataset,
    sections: Sequence[Section],
    tokenizer: PreTrainedTokenizerBase,
    history: Sequence[Line],
    provenance: Provenance,
    table_rows: int,
) -> Report:
    """The whole report; only the main process needs one.

    Args:
        scores: Of the held-out pairs.
        samples: None if nothing was sampled.
        data: Held-out groups.
        sections: On the data that was trained and evaluated on.
        tokenizer: The policy's.
        history: Metrics of the training, up to the model that is evaluated; empty for a run without rewards.
        provenance: What was compared, and how.
        table_rows: Rows of the table of samples.
    """
    summary = pair_summary(scores, data.sources) | (samples.summary if samples is not None else {})
    rows = sample_rows(samples) if samples is not None else []
    figures = [*training_figures(history), *margin_figures(scores)]
    if samples is not None:
        figures += score_figures(samples)
    return Report(
        summary=summary,
        rows=rows,
        table_rows=table_rows,
        provenance=provenance,
        figures=figures,
        data=sections,
        held_out=pair_values(scores),
        for_judges=for_judges(samples) if samples is not None else (),
        judged=[{"index": n, **one._asdict()} for n, one in enumerate(samples.judged)] if samples else (),
        worst_pairs=worst_pairs(scores, data, tokenizer),
        worst_samples=worst_samples(rows),
    )


def pair_values(scores: PairScores) -> list[dict[str, float]]:
    """What was measured of every held-out pair, in their order; a number that is not finite is left out."""
    columns = {
        "prompt": scores.groups,
        "correct": scores.correct,
        "margin": scores.margins,
        "loss": scores.losses,
        "unit": scores.units,
    }
    rows = zip(*(values.tolist() for values in columns.values()), strict=True)
    return [
        {name: value for name, value in zip(columns, row, strict=True) if math.isfinite(value)}
        for row in rows
    ]


def sample_rows(samples: ComparedSamples) -> list[SampleRow]:
    """One row per prompt."""
    no_scores = [None] * len(samples.prompts)
    return [
        SampleRow(
            index=index,
            seed=samples.seed,
            prompt=prompt,
            reference=reference,
            policy=policy,
            reference_score=reference_score,
            policy_score=policy_score,
        )
        for index, (prompt, reference, policy, reference_score, policy_score) in enumerate(
            zip(
                samples.prompts,
                samples.reference,
                samples.policy,
                samples.reference_scores or no_scores,
                samples.policy_scores or no_scores,
                strict=True,
            )
        )
    ]


def for_judges(samples: ComparedSamples) -> list[dict[str, Any]]:
    """Both models' samples in AlpacaEval's layout, with the turns of chats, which it does not know."""
    return [
        {
            "dataset": "held-out",
            "instruction": asked.turns[0]["content"] if asked.turns and len(asked.turns) == 1 else asked.text,
            "messages": [{"role": "user", "content": asked.text}] if asked.turns is None else [*asked.turns],
            "output": output,
            "generator": generator,
        }
        for generator, outputs in (("reference", samples.reference), ("policy", samples.policy))
        for asked, output in zip(samples.asked, outputs, strict=True)
    ]


def training_figures(history: Sequence[Line]) -> list[Captioned]:
    """Loss, margin and rewards over the optimizer steps; none without a history."""
    if not history:
        return []
    return [
        Captioned(
            name="training",
            title="Loss and margin",
            caption="If held-out loss rises while training loss falls, the policy overfits. The loss of DPO "
            "starts at ln 2 = 0.693.",
            figure=losses_and_margins({"": history}),
        ),
        Captioned(
            name="rewards",
            title="Rewards of chosen and rejected",
            caption="The two parts of the margin. Both may fall; if the chosen reward falls fast, the policy "
            "makes the text as a whole less likely.",
            figure=rewards_over_steps(history),
        ),
    ]


def margin_figures(scores: PairScores) -> list[Captioned]:
    """The held-out pairs before and after training; none without pairs or reference log-probs."""
    if not np.isfinite(scores.reference_logps).all() or not scores.has_rivals.any():
        return []
    before = (scores.reference_logps[:, 0] - scores.reference_logps[:, 1])[scores.has_rivals]
    after = (scores.chosen_logps - scores.rejected_logps)[scores.has_rivals]
    return [
        Captioned(
            name="margins",
            title="Held-out pairs before and after",
            caption="Log-probability of the chosen minus that of the rejected completion, for every held-out "
            "pair. Training should move it to the right; beta times the shift is DPO's reward margin.",
            figure=histogram_before_and_after(
                before,
                after,
                title="Chosen against rejected, before and after",
                unit="log p(chosen) - log p(rejected), nats",
                counted="held-out pairs",
            ),
        )
    ]


def score_figures(samples: ComparedSamples) -> list[Captioned]:
    """Scores of both models, and score against KL; none without a scorer."""
    if samples.reference_scores is None or samples.policy_scores is None:
        return []
    points = {"reference": [Point.of_reference(samples.summary)], "policy": [Point.of(samples.summary)]}
    return [
        Captioned(
            name="scores",
            title="Scores of the samples",
            caption="The score of every sample; both models on the same prompts and seeds.",
            figure=histogram_before_and_after(
                samples.reference_scores,
                samples.policy_scores,
                title="Scores of the samples",
                unit="score",
                counted="samples",
            ),
        ),
        Captioned(
            name="score_kl",
            title="Score against KL",
            caption="What the policy gained and what it cost. dpo frontier draws several betas in one such "
            "figure.",
            figure=score_against_kl(points, joined=False),
        ),
    ]


def worst_pairs(
    scores: PairScores, data: TokenizedDataset, tokenizer: PreTrainedTokenizerBase
) -> list[PairRow]:
    """The held-out pairs, or labelled completions, that the policy ranks wrong by the largest margin."""
    worst = np.argsort(scores.margins, kind="stable")[:WORST]
    worst = worst[scores.margins[worst] < 0]
    measures = [f"{margin:+.2f}" for margin in scores.margins[worst]]
    return pair_rows(data, worst, measures, tokenizer)


def worst_samples(rows: Sequence[SampleRow]) -> list[SampleRow]:
    """The samples that score furthest below the reference's."""
    lost = [
        (row.policy_score - row.reference_score, row.index, row)
        for row in rows
        if row.policy_score is not None
        and row.reference_score is not None
        and row.policy_score < row.reference_score
    ]
    return [row for *_, row in sorted(lost, key=lambda entry: entry[:2])[:WORST]]
