"""The frontier: its order of stages, which ones it repeats, how it handles failures, its table and curves.

The launcher is replaced by a script that writes the files of each stage.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from dpo.cli.main import run
from dpo.cli.parse import parse
from dpo.commands.frontier import (
    BEST_OF,
    SFT,
    Evaluated,
    Sweep,
    beyond_limit,
    frontier_curves,
    frontier_table,
    limit_points,
    run_frontier,
    sft_baseline,
)
from dpo.config import (
    Config,
    DataConfig,
    DataSource,
    EvaluateConfig,
    LoraConfig,
    ModelConfig,
    SftConfig,
    TrainConfig,
    flat,
    resolved,
)
from dpo.errors import RunFailed, StoppedBySignal, UserError

STAND_IN = """
import json, os, sys, time
from pathlib import Path
stage, *keys = sys.argv[1:]
options = dict(zip(keys[::2], keys[1::2]))
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([stage, options]) + "\\n")
if stage == "sft":
    import yaml
    baseline = yaml.safe_load(Path(options["--config"]).read_text())
    options["--run_dir"] = baseline["run_dir"]
    options["--train.snapshot_every"] = baseline["train"]["snapshot_every"]
if stage == os.environ.get("FAILS"):
    sys.exit(int(os.environ["STATUS"]))
if stage == os.environ.get("HANGS"):
    import signal
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
    Path(os.environ["CALLS"] + ".waiting").touch()
    time.sleep(60)
folder = Path(options.get("--run_dir", "."))
if stage in ("train", "sft"):
    steps = int(options.get("--train.snapshot_every", 0))
    for place in ["model", *(f"snapshots/step_{n * steps:08d}" for n in (1, 2) if steps)]:
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "README.md").write_text("a card")
if stage == "evaluate":
    step = options.get("--evaluate.snapshot")
    report = folder / (f"snapshots/step_{int(step):08d}/report" if step else "report")
    report.mkdir(parents=True, exist_ok=True)
    kl = 1 / float(options.get("--loss.beta", 1)) * (int(step) / 100 if step else 1)
    numbers = {"kl/sequence": kl, "score/policy": 0.5, "score/reference": 0.1}
    numbers |= {f"{k}/{e}": v for k, v in numbers.items() for e in ("low", "high")}
    (report / "summary.json").write_text(json.dumps(numbers))
if stage == "best-of":
    (folder / "best_of").mkdir(parents=True)
    numbers = {"kl/sequence": 0.6, "score/policy": 0.45, "score/reference": 0.1}
    numbers |= {f"{k}/{e}": v for k, v in numbers.items() for e in ("low", "high")}
    limit = {"kl": [0.0, 1.0, 3.0], "score": [[0.1, 0.1, 0.1], [0.3, 0.29, 0.31], [0.6, 0.59, 0.61]]}
    (folder / "best_of" / "best_of.json").write_text(json.dumps({"best_of": {"4": numbers}, "limit": limit}))
"""


class Rig:
    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, folder / "calls"
        (folder / "stand_in.py").write_text(STAND_IN)
        self.launcher = [sys.executable, str(folder / "stand_in.py")]

    def sweep(self, **options: Any) -> Sweep:
        config = Config(
            run_dir=str(self.folder / "base"),
            model=ModelConfig(name_or_path="m"),
            data=DataConfig(train="d"),
            evaluate=EvaluateConfig(scorer="vader"),
        )
        given: dict[str, Any] = {
            "config": config,
            "keys": ["--config", "x.yaml"],
            "betas": [0.1, 0.5],
            "snapshot_every": 0,
            "sft_learning_rate": 1e-4,
            "best_of": False,
            "launcher": self.launcher,
            "output": self.folder / "out",
        }
        return Sweep(**{**given, **options})

    def called(self) -> list[tuple[str, dict[str, str]]]:
        lines = self.calls.read_text().splitlines() if self.calls.is_file() else []
        self.calls.unlink(missing_ok=True)
        return [tuple(json.loads(line)) for line in lines]


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    made = Rig(tmp_path)
    monkeypatch.setenv("CALLS", str(made.calls))
    return made


def test_each_beta_and_the_baseline_are_trained_and_evaluated_on_one_cache(rig: Rig) -> None:
    run_frontier(rig.sweep())
    calls = rig.called()
    assert [stage for stage, _ in calls] == ["precompute-ref", *["train", "evaluate"] * 2, "sft", "evaluate"]
    out = rig.folder / "out"
    assert [options.get("--run_dir") for _, options in calls[1:] if "--run_dir" in options] == [
        *(str(out / name) for name in ("beta_0.1", "beta_0.5") for _ in range(2)),
        str(out / "preferred_sft"),
    ]
    assert [options["--loss.beta"] for stage, options in calls if stage == "train"] == ["0.1", "0.5"]
    sft = calls[-2][1]
    assert sft["--config"] == str(out / "preferred_sft.yaml")
    points = json.loads((out / "frontier.json").read_text())
    assert [(point["curve"], point["kl/sequence"]) for point in points] == [
        ("beta 0.1", 10.0),
        ("beta 0.5", 2.0),
        (SFT, 1.0),
    ]
    assert (out / "frontier.png").is_file()
    assert "| beta 0.5 | last | 2.000 | 0.500 |" in (out / "frontier.md").read_text()


def test_the_baseline_equals_the_experiment_on_every_key_that_both_have(rig: Rig, tmp_path: Path) -> None:
    """Every shared key is moved away from its default; what the baseline has of it must be the same."""
    experiment = Config(
        model=ModelConfig(
            name_or_path="m",
            revision="r",
            dtype="float32",
            attention="eager",
            share_prompts=False,
            compile=True,
            gradient_checkpointing=True,
            offload_activations=True,
            quantization="nf4",
            router_aux_loss_weight=0.01,
            trust_remote_code=True,
            lora=LoraConfig(rank=4, target_modules=["a", "b"]),
        ),
        data=DataConfig(
            train=[DataSource(path="d", weight=2.0), DataSource(path="e")],
            test=[DataSource(path="t")],
            max_length=100,
            max_prompt_length=50,
            too_long="drop",
            group_pairs=False,
            pairing="all",
            min_margin=0.5,
            append_eos=False,
            strict=True,
            cache_dir="c",
            num_workers=3,
        ),
        train=TrainConfig(
            schedule="cosine",
            warmup_steps=3,
            warmup_ratio=0.2,
            min_learning_rate=1e-9,
            optimizer="rmsprop",
            adam_betas=(0.5, 0.6),
            adam_epsilon=1e-7,
            weight_decay=0.1,
            max_grad_norm=10.0,
            num_epochs=2,
            max_steps=7,
            backward="cached",
            max_tokens_per_micro_batch=200,
            seed=5,
            evaluate_every=6,
            checkpoint_every=8,
            checkpoint_async=False,
            keep_last=9,
            keep_best=True,
            dither_masters=False,
            deterministic=True,
            max_skipped_steps=1,
            stuck_after_seconds=11.0,
            peak_tflops=12.0,
            trackers=["wandb"],
            push_to_hub="user/name",
            mirror="memory://copy",
            pairs_per_step=13,
        ),
    )
    sweep = replace(rig.sweep(snapshot_every=20), config=experiment)
    baseline = sft_baseline(sweep, tmp_path / "run")
    mine, theirs, plain = (
        flat(resolved(config))
        for config in (
            experiment,
            baseline,
            Config(model=ModelConfig(name_or_path="x"), data=DataConfig(train="x")),
        )
    )
    own = {"run_dir", "train.learning_rate", "train.snapshot_every", "train.resume", "train.resume_allow"}
    shared = (mine.keys() & theirs.keys()) - own
    assert {key for key in shared if mine[key] == plain.get(key)} == set()  # the test forgets no key
    assert {key: theirs[key] for key in shared} == {key: mine[key] for key in shared}
    assert baseline.train.sequences_per_step == 13
    assert (baseline.train.learning_rate, baseline.train.snapshot_every) == (1e-4, 20)


def test_the_baselines_file_is_one_that_sft_reads(rig: Rig) -> None:
    run_frontier(rig.sweep(snapshot_every=20))
    file = rig.folder / "out" / "preferred_sft.yaml"
    config = cast(SftConfig, parse("sft", ["--config", str(file)]))
    assert config == sft_baseline(rig.sweep(snapshot_every=20), rig.folder / "out" / "preferred_sft")


def test_finished_stages_are_skipped_and_changed_ones_run_again(rig: Rig) -> None:
    run_frontier(rig.sweep())
    rig.called()
    run_frontier(rig.sweep())
    assert [stage for stage, _ in rig.called()] == ["precompute-ref"]
    run_frontier(rig.sweep(betas=[0.1, 0.5, 1.0]))
    assert [options.get("--loss.beta") for _, options in rig.called()[1:]] == ["1", "1"]
    run_frontier(rig.sweep(keys=["--config", "x.yaml", "--train.seed", "1"], sft_learning_rate=None))
    assert len(rig.called()) == 5
    (rig.folder / "out" / "beta_0.1" / "report" / "summary.json").unlink()
    run_frontier(rig.sweep(keys=["--config", "x.yaml", "--train.seed", "1"], sft_learning_rate=None))
    assert [stage for stage, _ in rig.called()] == ["precompute-ref", "evaluate"]


def test_snapshots_are_points_on_the_curve_of_their_run(rig: Rig) -> None:
    run_frontier(rig.sweep(betas=[0.1], snapshot_every=30))
    calls = rig.called()
    assert calls[1][1]["--train.snapshot_every"] == "30"
    steps = [options.get("--evaluate.snapshot") for stage, options in calls if stage == "evaluate"]
    assert steps == ["30", "60", None] * 2
    points = json.loads((rig.folder / "out" / "frontier.json").read_text())
    assert [(point["curve"], point["step"]) for point in points][:3] == [
        ("beta 0.1", 30),
        ("beta 0.1", 60),
        ("beta 0.1", None),
    ]


def test_best_of_n_is_drawn_and_scores_beyond_the_limit_are_reported(
    rig: Rig, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = rig.sweep(betas=[0.5, 1.0], best_of=True)
    with pytest.raises(UserError, match=r"evaluate.temperature: 0.7; expected 1 with --best_of"):
        run_frontier(sweep)
    config = replace(sweep.config, evaluate=replace(sweep.config.evaluate, temperature=1.0))
    run_frontier(replace(sweep, config=config))
    stage, options = rig.called()[-1]
    assert (stage, options["--run_dir"]) == ("best-of", str(rig.folder / "out" / "reference"))
    # Between 1 and 3 nats the limit goes from 0.3 to 0.6: beta 0.5 has 0.5 at 2, beta 1 and SFT at 1.
    said = [line for line in capsys.readouterr().out.splitlines() if "more than any policy can" in line]
    assert [line.partition(", step")[0].split("warning: ")[-1].strip() for line in said] == [
        "beta 0.5",
        "beta 1",
        SFT,
        f"{BEST_OF} 4",
    ]
    assert f"| {BEST_OF} | n = 4 | 0.600 | 0.450 |" in (rig.folder / "out" / "frontier.md").read_text()
    assert (rig.folder / "out" / "frontier.png").is_file()


def test_a_model_is_beyond_the_limit_only_where_its_interval_is() -> None:
    def model(kl: float, low: float) -> Evaluated:
        numbers = {"kl/sequence/high": kl, "score/policy/low": low}
        return Evaluated(curve="x", step=None, summary=numbers)

    limit = limit_points({"kl": [0.0, 2.0], "score": [[0.0, 0.0, 0.1], [1.0, 0.9, 1.1]]})
    models = [model(1.0, 0.59), model(1.0, 0.61), model(2.5, 5.0)]
    assert beyond_limit(models, limit) == [models[1]]
    assert beyond_limit(models, []) == []


@pytest.mark.parametrize(("status", "error"), [(2, UserError), (3, StoppedBySignal), (1, RunFailed)])
def test_a_failed_stage_ends_the_sweep_which_can_be_continued(
    rig: Rig, status: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILS", "sft")
    monkeypatch.setenv("STATUS", str(status))
    with pytest.raises(error, match=f"sft exited with status {status}"):
        run_frontier(rig.sweep())
    rig.called()
    monkeypatch.delenv("FAILS")
    run_frontier(rig.sweep())
    assert [stage for stage, _ in rig.called()] == ["precompute-ref", "sft", "evaluate"]


def test_a_signal_reaches_the_stage_and_the_sweep_exits_with_its_status(rig: Rig, tmp_path: Path) -> None:
    config = tmp_path / "x.yaml"
    config.write_text("model: {name_or_path: m}\ndata: {train: d}\nevaluate: {scorer: vader}\n")
    launcher = " ".join(rig.launcher)
    command = [sys.executable, "-m", "dpo", "frontier", "--config", str(config), "--betas", "0.1"]
    command += ["--launcher", launcher, "--output", str(tmp_path / "out")]
    environment = {**os.environ, "HANGS": "train"}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as sweep:
        waiting = Path(f"{rig.calls}.waiting")
        until = time.monotonic() + 60
        while not waiting.exists() and time.monotonic() < until:
            time.sleep(0.05)
        sweep.send_signal(signal.SIGTERM)
        _, said = sweep.communicate(timeout=60)
    assert sweep.returncode == 3
    assert "train exited with status 3" in said


def test_all_problems_are_reported_before_any_stage_starts(rig: Rig) -> None:
    base = rig.sweep().config
    config = Config(model=base.model, data=base.data, evaluate=EvaluateConfig(num_prompts=0))
    with pytest.raises(UserError) as error:
        run_frontier(rig.sweep(config=config))
    named = [line.split(":")[0] for line in str(error.value).splitlines()]
    assert named == ["evaluate.scorer", "evaluate.num_prompts"]
    assert rig.called() == []


@pytest.mark.parametrize(
    "options",
    [["--betas", "0.1,x"], ["--betas", "0"], ["--betas", "1,1"], ["--snapshot_every", "-1"]],
)
def test_invalid_options_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["frontier", "--config", "x.yaml", *options]) == 2
    assert options[0] in capsys.readouterr().err


def test_runs_without_snapshots_share_a_curve_ordered_by_kl() -> None:
    def model(curve: str, kl: float) -> Evaluated:
        numbers = {"kl/sequence": kl, "score/policy": kl / 10, "score/reference": 0.0}
        ends = {f"{name}/{end}": value for name, value in numbers.items() for end in ("low", "high")}
        return Evaluated(curve=curve, step=None, summary=numbers | ends)

    models = [model("beta 0.1", 5.0), model("beta 1", 1.0), model(SFT, 2.0)]
    curves = frontier_curves(models)
    assert list(curves) == ["reference", "DPO, by beta", SFT]
    assert [point.label for point in curves["DPO, by beta"]] == ["1", "0.1"]
    assert len(frontier_table(models).splitlines()) == 5
