"""From what an evaluation measured to its report: numbers with intervals, figures, failures, provenance."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from transformers import PreTrainedTokenizerBase

from dpo import distributed
from dpo.config import Config, EvaluateConfig
from dpo.data.dataset import TokenizedDataset
from dpo.data.records import TokenIds
from dpo.evaluate.breakdown import length_summary, source_summary
from dpo.evaluate.rewards import PairScores
from dpo.evaluate.scoring import load_scorer, score_over_ranks
from dpo.evaluate.statistics import Interval, distinct_n, mean_interval, ratio_interval, repetition, win_rate
from dpo.loss.catalog import title_of
from dpo.report.content import PairRow, Report, SampleRow
from dpo.report.figures import (
    Captioned,
    Point,
    histogram_before_and_after,
    losses_and_margins,
    rewards_over_steps,
    score_against_kl,
)
from dpo.tracking.history import Line, read_history
from dpo.tracking.run_folder import RunFolder

WORST = 3
"""Pairs and samples that the report shows as failures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Continuations of held-out prompts by both models, and the KL of other samples."""

    prompts: list[TokenIds]
    reference: list[str]
    policy: list[str]
    tokens: dict[str, list[int]]
    """reference, policy -> tokens of each continuation."""
    kl: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Numbers of both models' samples."""

    summary: dict[str, float] = field(default_factory=dict)
    rows: list[SampleRow] = field(default_factory=list)


def pair_summary(scores: PairScores, data: TokenizedDataset) -> dict[str, float]:
    """Held-out metrics with intervals, by length and by source."""
    intervals = {"eval/rewards/accuracies": scores.correct, "eval/rewards/margins": scores.margins}
    found = scores.means()
    found |= ratio_interval(scores.losses, scores.units, scores.groups).under("eval/loss")
    for name, values in intervals.items():
        found |= mean_interval(values, scores.groups).under(name)
    return found | length_summary(scores) | source_summary(scores, data.sources)


def compare(samples: Samples, options: EvaluateConfig, tokenizer: PreTrainedTokenizerBase) -> Compared:
    """Scores both models' samples, spread over the ranks. All ranks must call it."""
    both = {"reference": samples.reference, "policy": samples.policy}
    prompts = [str(tokenizer.decode(prompt, skip_special_tokens=True)) for prompt in samples.prompts]
    clusters = np.arange(len(prompts))
    summary: dict[str, float] = {}
    scores: dict[str, list[float]] = {}
    if options.scorer is not None:
        scorer = load_scorer(options.scorer)
        scores = {name: score_over_ranks(scorer, texts) for name, texts in both.items()}
        for name, values in scores.items():
            positive = [float(scorer.is_positive(value)) for value in values]
            summary |= mean_interval(values, clusters).under(f"score/{name}")
            summary |= mean_interval(positive, clusters).under(f"positive_share/{name}")
        summary |= win_rate(scores["policy"], scores["reference"], clusters).under("win_rate")
    summary |= samples.kl
    for name, texts in both.items():
        summary[f"distinct_2/{name}"] = distinct_n([text.split() for text in texts], 2)
        summary[f"distinct_texts/{name}"] = len(set(texts)) / len(texts)
        summary |= mean_interval(samples.tokens[name], clusters).under(f"sample_tokens/{name}")
        summary[f"repetition/{name}"] = repetition([text.split() for text in texts], 2)
    rows = [
        SampleRow(
            index=index,
            seed=options.seed,
            prompt=prompt,
            reference=samples.reference[index],
            policy=samples.policy[index],
            reference_score=scores["reference"][index] if scores else None,
            policy_score=scores["policy"][index] if scores else None,
        )
        for index, prompt in enumerate(prompts)
    ]
    return Compared(summary=summary, rows=rows)


def compose(
    config: Config,
    data: TokenizedDataset,
    tokenizer: PreTrainedTokenizerBase,
    scores: PairScores,
    compared: Compared,
    identity: dict[str, str],
) -> Report:
    """The whole report; only the main process needs one.

    Args:
        config: The experiment.
        data: Held-out groups.
        tokenizer: The policy's.
        scores: Of the held-out pairs.
        compared: Of the samples; empty where none were asked for.
        identity: Digests of data and cache, by name.
    """
    summary = pair_summary(scores, data) | compared.summary
    return Report(
        summary=summary,
        rows=compared.rows,
        table_rows=config.evaluate.table_rows,
        essentials=_essentials(config, data),
        provenance=identity | _environment(Path(config.run_dir)),
        commands=_commands(config),
        figures=_figures(_history(config), scores, compared, summary),
        worst_pairs=_worst_pairs(scores, data, tokenizer),
        worst_samples=_worst_samples(compared.rows),
    )


def model_folder(config: Config) -> Path:
    """The model that is evaluated: the last one, or a snapshot."""
    step = config.evaluate.snapshot
    return Path(config.run_dir) / ("model" if step is None else f"snapshots/step_{step:08d}")


def report_folder(config: Config) -> Path:
    """Where its report belongs: a snapshot's is in its own folder."""
    return (Path(config.run_dir) if config.evaluate.snapshot is None else model_folder(config)) / "report"


def learned_preferences(run_dir: Path) -> bool:
    """Whether `train` made the run, and not `sft`; a folder without a configuration counts as that."""
    file = run_dir / "config.yaml"
    return not file.is_file() or "loss" in yaml.safe_load(file.read_text())


def _history(config: Config) -> list[Line]:
    """Of the run, up to the model that is evaluated; none of one that learned next tokens."""
    last = config.evaluate.snapshot
    lines = read_history(RunFolder(Path(config.run_dir))) if learned_preferences(Path(config.run_dir)) else []
    return [line for line in lines if last is None or line["step"] <= last]


def _figures(
    history: Sequence[Line], scores: PairScores, compared: Compared, summary: dict[str, float]
) -> list[Captioned]:
    made = [_margins(scores)] if np.isfinite(scores.reference_logps).all() else []
    if history:
        made = [
            Captioned(
                name="training",
                title="Loss and margin",
                caption="Held-out loss that rises while training loss falls is overfitting. The loss of DPO "
                "starts at ln 2 = 0.693.",
                figure=losses_and_margins({"": history}),
            ),
            Captioned(
                name="rewards",
                title="Rewards of chosen and rejected",
                caption="What the margin is made of. Both may fall; the chosen one falling fast is a sign "
                "of text that becomes unlikely as a whole.",
                figure=rewards_over_steps(history),
            ),
            *made,
        ]
    if "score/policy" not in summary:
        return made
    by_model = [
        [score for row in compared.rows if (score := getattr(row, f"{name}_score")) is not None]
        for name in ("reference", "policy")
    ]
    kl = Interval(summary["kl/sequence"], summary["kl/sequence/low"], summary["kl/sequence/high"])
    ends = [("reference", Interval(0.0, 0.0, 0.0)), ("policy", kl)]
    points = {name: [Point(label="", kl=kl, score=_interval(summary, f"score/{name}"))] for name, kl in ends}
    return [
        *made,
        Captioned(
            name="scores",
            title="Scores of the samples",
            caption="The scorer's value of every sample, both models on the same prompts and seeds.",
            figure=histogram_before_and_after(
                *by_model, title="Scores of the samples", unit="score", counted="samples"
            ),
        ),
        Captioned(
            name="score_kl",
            title="Score against KL",
            caption="What was won and what it cost. dpo frontier draws several betas into one such figure.",
            figure=score_against_kl(points, "mean score", joined=False),
        ),
    ]


def _margins(scores: PairScores) -> Captioned:
    before = scores.reference_logps[:, 0] - scores.reference_logps[:, 1]
    return Captioned(
        name="margins",
        title="Held-out pairs before and after",
        caption="Log-probability of the chosen less that of the rejected completion, for every held-out "
        "pair. Training should move it to the right; beta times the shift is DPO's reward margin.",
        figure=histogram_before_and_after(
            before,
            scores.chosen_logps - scores.rejected_logps,
            title="Chosen against rejected, before and after",
            unit="log p(chosen) - log p(rejected), nats",
            counted="held-out pairs",
        ),
    )


def _interval(summary: dict[str, float], name: str) -> Interval:
    return Interval(summary[name], summary[f"{name}/low"], summary[f"{name}/high"])


def _worst_pairs(
    scores: PairScores, data: TokenizedDataset, tokenizer: PreTrainedTokenizerBase
) -> list[PairRow]:
    """The held-out pairs that the policy ranks wrong by the largest margin."""
    rows = []
    for pair in np.argsort(scores.margins, kind="stable")[:WORST].tolist():
        if scores.margins[pair] >= 0:
            break
        number = int(scores.groups[pair])
        group = data[number]
        chosen, rejected = group.pairs[pair - int(data.group_pairs[number])]
        texts = (group.prompt, group.completions[chosen], group.completions[rejected])
        prompt, *both = (str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in texts)
        rows.append(
            PairRow(prompt=prompt, chosen=both[0], rejected=both[1], margin=float(scores.margins[pair]))
        )
    return rows


def _worst_samples(rows: Sequence[SampleRow]) -> list[SampleRow]:
    """The samples that score furthest below the reference's."""
    lost = [
        (row.policy_score - row.reference_score, row.index, row)
        for row in rows
        if row.policy_score is not None
        and row.reference_score is not None
        and row.policy_score < row.reference_score
    ]
    return [row for *_, row in sorted(lost, key=lambda entry: entry[:2])[:WORST]]


def _essentials(config: Config, data: TokenizedDataset) -> dict[str, str]:
    evaluate, train, loss = config.evaluate, config.train, config.loss
    trained = {
        "loss": title_of(loss),
        "training": f"learning rate {train.learning_rate}, {train.pairs_per_step} pairs a step, "
        f"{train.num_epochs} epoch(s), {train.optimizer}, seed {train.seed}",
    }
    if not learned_preferences(Path(config.run_dir)):
        trained = {"training": "next tokens; the loss and the rewards here are those of its use as a policy"}
    return {
        "policy": f"{model_folder(config)}, from {config.model.name_or_path}",
        "reference": config.reference.model or config.model.name_or_path,
        **trained,
        "held-out data": f"{data.counts['pairs']} pairs of {data.counts['groups']} prompts",
        "samples": f"{evaluate.num_prompts} prompts, temperature {evaluate.temperature}, up to "
        f"{evaluate.completion_tokens} tokens, seed {evaluate.seed}, scorer {evaluate.scorer or 'none'}",
        "KL": "estimated from samples of its own at temperature 1, without top-k or top-p",
        "intervals": "95 %, bootstrapped by prompt",
    }


def _environment(run_dir: Path) -> dict[str, str]:
    """What training left in environment.json, and the ranks of this evaluation."""
    file = run_dir / "environment.json"
    found: dict[str, str] = {}
    if file.is_file():
        trained = json.loads(file.read_text())
        found["trained by"] = f"{trained['engine']}, {trained['world_size']} rank(s)"
        packages = trained["packages"].items()
        found["versions"] = ", ".join(
            [f"python {trained['python']}", *(f"{name} {version}" for name, version in packages)]
        )
        found["code"] = f"git commit {trained['git_commit'] or 'unknown'}"
    device = distributed.device().type
    return found | {"evaluated on": f"{distributed.world_size()} rank(s), {device}"}


def _commands(config: Config) -> list[str]:
    world, file = distributed.world_size(), f"{config.run_dir}/config.yaml"
    start = f"NPROC={world} launch/run" if world > 1 else "python -m dpo"
    return [f"{start} {name} --config {file}" for name in ("precompute-ref", "train", "evaluate")]


def headline(summary: dict[str, float]) -> str:
    """The numbers that a person wants first."""
    lines = [
        f"held-out loss {summary['eval/loss']:.4f}, reward accuracy {summary['eval/rewards/accuracies']:.3f} "
        f"[{summary['eval/rewards/accuracies/low']:.3f}, {summary['eval/rewards/accuracies/high']:.3f}]"
    ]
    if "positive_share/policy" in summary:
        lines.append(
            f"scored positive: reference {summary['positive_share/reference']:.1%}, "
            f"policy {summary['positive_share/policy']:.1%}; win rate {summary['win_rate']:.1%}"
        )
    if "kl/sequence" in summary:
        lines.append(
            f"KL(policy || reference) {summary['kl/sequence']:.2f} nats a sequence; distinct continuations: "
            f"reference {summary['distinct_texts/reference']:.1%}, "
            f"policy {summary['distinct_texts/policy']:.1%}"
        )
    return "\n".join(lines)
