"""dpo frontier: one experiment with several betas and a baseline, evaluated by score and KL.

Every part is an ordinary stage: `precompute-ref` once, then `train` or `sft`, then `evaluate`. Finished
stages are skipped: done.json records their command and configuration (`journal`).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo import terminal
from dpo.commands.journal import Journal, start
from dpo.config import Config
from dpo.errors import UserError
from dpo.evaluate.statistics import Interval
from dpo.files import write_file
from dpo.report import labels
from dpo.report.figures import Point, save_png, score_against_kl
from dpo.report.markdown import table
from dpo.tracking.history import read_history

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
    start("precompute-ref", [*sweep.launcher, "precompute-ref", *sweep.keys])
    models: list[Evaluated] = []
    for beta in sweep.betas:
        run_dir = sweep.output / f"beta_{beta:g}"
        keys = [*sweep.keys, "--run_dir", str(run_dir), "--loss.beta", f"{beta:g}"]
        snapshots = ["--train.snapshot_every", str(sweep.snapshot_every)] if sweep.snapshot_every else []
        _once(sweep, "train", [*keys, *snapshots], run_dir / "model" / "README.md")
        models += _evaluated(sweep, f"beta {beta:g}", run_dir, keys)
    if sweep.sft_learning_rate is not None:
        run_dir = sweep.output / "preferred_sft"
        _once(sweep, "sft", _sft_keys(sweep, run_dir), run_dir / "model" / "README.md")
        models += _evaluated(sweep, SFT, run_dir, [*sweep.keys, "--run_dir", str(run_dir)])
    limit: list[Point] = []
    if sweep.best_of:
        run_dir = sweep.output / "reference"
        product = run_dir / "best_of" / "best_of.json"
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
        problems.append("evaluate.scorer: nothing; expected vader or hf:MODEL: the frontier needs scores")
    if config.evaluate.num_prompts < 1:
        problems.append("evaluate.num_prompts: 0; expected at least 1: the frontier needs samples")
    if sweep.best_of and config.evaluate.temperature != 1:
        problems.append(
            f"evaluate.temperature: {config.evaluate.temperature}; expected 1 with --best_of: KL and limit "
            "are those of samples at temperature 1"
        )
    if sweep.sft_learning_rate is not None and not isinstance(config.data.train, str):
        problems.append("data.train: a mixture; the SFT baseline takes one source: give --no_sft")
    if problems:
        raise UserError("\n".join(problems))


def _sft_keys(sweep: Sweep, run_dir: Path) -> list[str]:
    """The baseline sees what DPO sees: the same model and data, as many examples a step, the same seed."""
    model, data, train = sweep.config.model, sweep.config.data, sweep.config.train
    given: dict[str, Any] = {
        "run_dir": run_dir,
        "model.name_or_path": model.name_or_path,
        "model.revision": model.revision,
        "model.dtype": model.dtype,
        "model.attention": model.attention,
        "data.train": data.train,
        "data.test": data.test if isinstance(data.test, str) else None,
        "data.max_length": data.max_length,
        "data.append_eos": data.append_eos,
        "data.cache_dir": data.cache_dir,
        "train.learning_rate": sweep.sft_learning_rate,
        "train.schedule": train.schedule,
        "train.warmup_steps": train.warmup_steps,
        "train.sequences_per_step": train.pairs_per_step,
        "train.max_tokens_per_micro_batch": train.max_tokens_per_micro_batch,
        "train.num_epochs": train.num_epochs,
        "train.max_steps": train.max_steps,
        "train.seed": train.seed,
        "train.checkpoint_every": train.checkpoint_every,
        "train.snapshot_every": sweep.snapshot_every,
    }
    if model.lora is not None:
        given |= {f"model.lora.{name}": value for name, value in asdict(model.lora).items()}
    return [part for key, value in given.items() if value is not None for part in (f"--{key}", str(value))]


def _evaluated(sweep: Sweep, curve: str, run_dir: Path, keys: list[str]) -> list[Evaluated]:
    """Evaluates the snapshots of a run and its final model, and reads their summaries."""
    last = max((line["step"] for line in read_history(run_dir)), default=0)
    folders = sorted((run_dir / "snapshots").glob("step_*")) if sweep.snapshot_every else []
    found = []
    for folder in folders:
        step = int(folder.name.removeprefix("step_"))
        if step == last:  # the same weights as the final model
            break
        summary = folder / "report" / "summary.json"
        _once(sweep, "evaluate", [*keys, "--evaluate.snapshot", str(step)], summary)
        found.append(Evaluated(curve=curve, step=step, summary=json.loads(summary.read_text())))
    summary = run_dir / "report" / "summary.json"
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
    print(frontier_table(models))
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
