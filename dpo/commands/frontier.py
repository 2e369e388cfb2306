"""dpo frontier: one experiment with several betas and a baseline, evaluated by score and KL.

Every part is an ordinary stage: `precompute-ref` once, then `train` or `sft`, then `evaluate`. Finished
stages are skipped: done.json records their command and configuration (`journal`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from dpo import terminal
from dpo.commands.journal import Journal, start
from dpo.config import (
    Config,
    ModelConfig,
    OptimizationConfig,
    SftConfig,
    SftModelConfig,
    SftTrainConfig,
    resolved,
)
from dpo.errors import UserError
from dpo.evaluate.statistics import Interval
from dpo.files import write_file
from dpo.report import labels
from dpo.report.figures import Point, save_png, score_against_kl
from dpo.report.markdown import table
from dpo.tracking.history import last_step
from dpo.tracking.run_folder import RunFolder, settings_text

JOURNAL = "done.json"
SFT = "preferred-completion SFT"
BEST_OF = "best of n from the reference"
COLUMNS = (
    "kl/sequence",
    "score/policy",
    "positive_share/policy",
    "win_rate",
    "eval/rewards/accuracies",
    "distinct_2/policy",
    "perplexity/policy_samples",
)
"""Metrics of the table, in its order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """The runs of a frontier."""

    config: Config
    keys: Sequence[str]
    """The command-line arguments of `config`; every stage gets them, too."""
    betas: Sequence[float]
    snapshot_every: int
    """Optimizer steps between the models that are evaluated; 0: only the final model."""
    sft_learning_rate: float | None
    """None: no baseline."""
    best_of: bool
    """Whether to sample the reference for best of n and the limit of any policy."""
    launcher: Sequence[str]
    """The command before the name of a stage."""
    output: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """One model of the frontier."""

    curve: str
    """Its run: `beta 0.1`, or a baseline."""
    step: int | None
    """Its optimizer step, or None for the final model."""
    summary: dict[str, float]
    label: str = ""
    """Written beside its point if the curve does not say it: n of best of n."""


def run_frontier(sweep: Sweep) -> None:
    """Runs the stages that are not done, and writes frontier.md, frontier.json and frontier.png.

    Raises:
        UserError: The configuration has no scorer or no prompts, or a stage exited with status 2.
        StoppedBySignal: A stage was stopped; finished stages are skipped next time.
        RunFailed: A stage failed.
    """
    _check(sweep)
    sweep.output.mkdir(parents=True, exist_ok=True)
    cached = [*sweep.keys, "--run_dir", str(sweep.output / "reference")]
    start("precompute-ref", [*sweep.launcher, "precompute-ref", *cached])
    models: list[Evaluated] = []
    for beta in sweep.betas:
        run_dir = sweep.output / f"beta_{beta:g}"
        keys = [*sweep.keys, "--run_dir", str(run_dir), "--loss.beta", f"{beta:g}"]
        snapshots = ["--train.snapshot_every", str(sweep.snapshot_every)] if sweep.snapshot_every else []
        _once(sweep, "train", [*keys, *snapshots], RunFolder(run_dir).model() / "README.md")
        models += _evaluated(sweep, f"beta {beta:g}", run_dir, keys)
    if sweep.sft_learning_rate is not None:
        run_dir = sweep.output / "preferred_sft"
        _train_baseline(sweep, run_dir)
        models += _evaluated(sweep, SFT, run_dir, [*sweep.keys, "--run_dir", str(run_dir)])
    limit: list[Point] = []
    if sweep.best_of:
        run_dir = sweep.output / "reference"
        product = RunFolder(run_dir).best_of / "best_of.json"
        _once(sweep, "best-of", [*sweep.keys, "--run_dir", str(run_dir)], product)
        found = json.loads(product.read_text())
        models += [
            Evaluated(curve=BEST_OF, step=None, summary=summary, label=n)
            for n, summary in found["best_of"].items()
        ]
        limit = limit_points(found["limit"])
    _write(sweep, models, limit)


def _check(sweep: Sweep) -> None:
    config, problems = sweep.config, list[str]()
    if config.evaluate.scorer is None:
        problems.append("evaluate.scorer: none; expected one, such as vader: the frontier needs scores")
    if config.evaluate.num_prompts < 1:
        problems.append("evaluate.num_prompts: 0; expected at least 1: the frontier needs samples")
    if sweep.best_of and config.evaluate.temperature != 1:
        problems.append(
            f"evaluate.temperature: {config.evaluate.temperature}; expected 1 with --best_of: KL and limit "
            "are those of samples at temperature 1"
        )
    if problems:
        raise UserError("\n".join(problems))


def sft_baseline(sweep: Sweep, run_dir: Path) -> SftConfig:
    """The baseline sees what DPO sees: it equals the experiment on every key that both have.

    Exceptions: the sweep's learning rate and snapshots, how to resume, and `sequences_per_step`, which is the
    experiment's `pairs_per_step`.
    """
    config = sweep.config
    assert sweep.sft_learning_rate is not None
    own = {
        "learning_rate": sweep.sft_learning_rate,
        "snapshot_every": sweep.snapshot_every,
        "sequences_per_step": config.train.pairs_per_step,
        "resume": SftTrainConfig().resume,
        "resume_allow": SftTrainConfig().resume_allow,
    }
    shared = {field.name: getattr(config.train, field.name) for field in fields(OptimizationConfig)}
    model = {field.name: getattr(config.model, field.name) for field in fields(ModelConfig)}
    return SftConfig(
        run_dir=str(run_dir),
        model=SftModelConfig(**model),
        data=config.data,
        train=SftTrainConfig(**(shared | own)),
    )


def _train_baseline(sweep: Sweep, run_dir: Path) -> None:
    baseline = resolved(sft_baseline(sweep, run_dir))
    file = sweep.output / "preferred_sft.yaml"
    write_file(file, settings_text(baseline))
    product = RunFolder(run_dir).model() / "README.md"
    journal = Journal(file=sweep.output / JOURNAL)
    journal.once("sft", [*sweep.launcher, "sft", "--config", str(file)], product, baseline)


def _evaluated(sweep: Sweep, curve: str, run_dir: Path, keys: list[str]) -> list[Evaluated]:
    """Evaluates the snapshots of a run and its final model, and reads their summaries."""
    run = RunFolder(run_dir)
    last = last_step(run)
    folders = sorted(run.snapshots.glob("step_*")) if sweep.snapshot_every else []
    found = []
    for folder in folders:
        step = int(folder.name.removeprefix("step_"))
        if step == last:  # the same weights as the final model
            break
        summary = run.report(step) / "summary.json"
        _once(sweep, "evaluate", [*keys, "--evaluate.snapshot", str(step)], summary)
        found.append(Evaluated(curve=curve, step=step, summary=json.loads(summary.read_text())))
    summary = run.report() / "summary.json"
    _once(sweep, "evaluate", keys, summary)
    return [*found, Evaluated(curve=curve, step=None, summary=json.loads(summary.read_text()))]


def _once(sweep: Sweep, stage: str, keys: list[str], product: Path) -> None:
    """Runs a stage unless the same command and configuration were run before and the output exists."""
    journal = Journal(file=sweep.output / JOURNAL)
    journal.once(stage, [*sweep.launcher, stage, *keys], product, asdict(sweep.config))


def limit_points(limit: dict[str, Any]) -> list[Point]:
    """The limit of any policy, from best_of.json."""
    return [
        Point(label="", kl=Interval(kl, kl, kl), score=Interval(*score))
        for kl, score in zip(limit["kl"], limit["score"], strict=True)
    ]


def beyond_limit(models: Sequence[Evaluated], limit: Sequence[Point]) -> list[Evaluated]:
    """Models that score above the limit of any policy at their KL, beyond both intervals: a bug somewhere.

    Args:
        models: Evaluated models.
        limit: By ascending KL; models beyond its last KL are not checked.
    """
    return [
        model
        for model in models
        if limit
        and (kl := model.summary["kl/sequence/high"]) <= limit[-1].kl.mean
        and model.summary["score/policy/low"]
        > np.interp(kl, [point.kl.mean for point in limit], [point.score.high for point in limit])
    ]


def _write(sweep: Sweep, models: Sequence[Evaluated], limit: Sequence[Point]) -> None:
    for model in beyond_limit(models, limit):
        which = f"{model.curve} {model.label}".strip() + f", step {model.step or 'last'}"
        score, kl = model.summary["score/policy"], model.summary["kl/sequence"]
        terminal.warning(
            f"{which}: scores {score:.3f} at a KL of {kl:.2f} nats, more than any policy can: there is an "
            "error in the scores, the samples or the KL"
        )
    points = [
        {"curve": model.curve, "step": model.step, "label": model.label, **model.summary} for model in models
    ]
    write_file(sweep.output / "frontier.json", json.dumps(points, indent=2))
    write_file(sweep.output / "frontier.md", frontier_table(models))
    figure = score_against_kl(frontier_curves(models), limit=limit)
    save_png(figure, sweep.output / "frontier.png")
    terminal.answer("frontier", frontier_table(models), {"models": points})
    terminal.summary(
        "frontier",
        {
            "models": str(len(models)),
            "figure": str(sweep.output / "frontier.png"),
            "table": f"{sweep.output / 'frontier.md'}\nall numbers are in frontier.json",
            "next": f"dpo compare {sweep.output}/beta_*",
        },
    )


def frontier_curves(models: Sequence[Evaluated]) -> dict[str, list[Point]]:
    """Label -> points, the reference first; without snapshots all betas share one curve."""
    curves = {"reference": [Point.of_reference(models[0].summary)]}
    has_snapshots = any(model.step is not None for model in models)
    for model in models:
        label = model.label or ("" if has_snapshots else model.curve.removeprefix("beta "))
        own = has_snapshots or model.curve in (SFT, BEST_OF)
        points = curves.setdefault(model.curve if own else "DPO, by beta", [])
        points.append(Point.of(model.summary, label))
    return {label: sorted(points, key=lambda p: p.kl.mean) for label, points in curves.items()}


def frontier_table(models: Sequence[Evaluated]) -> str:
    """One row per model, in Markdown."""
    rows = []
    for model in models:
        step = "last" if model.step is None else str(model.step)
        cells = [f"{model.summary[name]:.3f}" if name in model.summary else "" for name in COLUMNS]
        rows.append([model.curve, f"n = {model.label}" if model.label else step, *cells])
    return table(["run", "step", *map(labels.short, COLUMNS)], rows) + "\n"
