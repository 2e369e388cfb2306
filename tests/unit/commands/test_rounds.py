"""Rounds: which commands they start with what, what a restart repeats, when they stop, and a real one.

The launcher is replaced by a script that writes the files of each command; the last test runs the commands.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.cli import main as data_prep
from dpo.cli.main import run
from dpo.commands import journal, rounds
from dpo.commands.rounds import Rounds, reason_to_stop, run_rounds
from dpo.config import Config, DataConfig, EvaluateConfig, LoraConfig, ModelConfig, ReferenceConfig
from dpo.errors import RunFailed, UserError

STAND_IN = """
import json, os, sys
from pathlib import Path
words = sys.argv[1:]
command, words = (words[1], words[2:]) if words[0] in ("dpo", "data_prep") else (words[0], words[1:])
if command == "sample":
    prompts, *words = words
flags = {"--overwrite": "overwrite", "--train_only": "train only"}
options = {flags[word]: True for word in words if word in flags}
words = [word for word in words if word not in flags]
options |= dict(zip(words[::2], words[1::2]))
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([command, options]) + "\\n")
if os.environ.get("FAILS") == f"{command} {options.get('--run_dir', options.get('--output'))}":
    sys.exit(1)
if command == "sample":
    Path(options["--output"]).mkdir(parents=True)
    Path(options["--output"], "manifest.json").write_text("{}")
if command == "train":
    Path(options["--run_dir"], "model").mkdir(parents=True)
    Path(options["--run_dir"], "model", "README.md").write_text("a card")
if command == "evaluate":
    number = int(Path(options["--run_dir"]).parent.name.removeprefix("round_"))
    report = Path(options["--run_dir"], "report")
    report.mkdir(parents=True)
    score = json.loads(os.environ["SCORES"])[number - 1]
    numbers = {"kl/sequence": float(number), "score/policy": score, "score/reference": 0.1}
    numbers |= {f"{k}/{e}": v for k, v in numbers.items() for e in ("low", "high")}
    (report / "summary.json").write_text(json.dumps(numbers))
"""


class Rig:
    def __init__(self, folder: Path) -> None:
        self.folder, self.calls, self.out = folder, folder / "calls", folder / "out"
        (folder / "stand_in.py").write_text(STAND_IN)

    def rounds(self, **options: Any) -> Rounds:
        config = Config(
            run_dir=str(self.folder / "base"),
            model=ModelConfig(name_or_path="start"),
            data=DataConfig(train="d", test="held_out"),
            evaluate=EvaluateConfig(scorer="vader"),
        )
        given: dict[str, Any] = {
            "config": config,
            "keys": ["--config", "x.yaml"],
            "number": 3,
            "prompts": "d",
            "reference": "start",
            "kl_limit": None,
            "patience": 0,
            "sample": ["--num_samples", "8"],
            "launcher": [sys.executable, str(self.folder / "stand_in.py")],
            "output": self.out,
        }
        return Rounds(**{**given, **options})

    def called(self) -> list[tuple[str, dict[str, str]]]:
        lines = self.calls.read_text().splitlines() if self.calls.is_file() else []
        self.calls.unlink(missing_ok=True)
        return [tuple(json.loads(line)) for line in lines]


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    made = Rig(tmp_path)
    monkeypatch.setenv("CALLS", str(made.calls))
    monkeypatch.setenv("SCORES", json.dumps([0.3, 0.5, 0.4]))
    return made


def test_each_round_starts_from_the_policy_before_with_prompts_of_its_own(rig: Rig) -> None:
    run_rounds(rig.rounds())
    calls = rig.called()
    assert [command for command, _ in calls] == ["sample", "precompute-ref", "train", "evaluate"] * 3
    policies = ["start", str(rig.out / "round_1/run/model"), str(rig.out / "round_2/run/model")]
    samples = [options for command, options in calls if command == "sample"]
    assert [options["--model"] for options in samples] == policies
    assert [options["--part"] for options in samples] == ["1/3", "2/3", "3/3"]
    assert {options["--seed"] for options in samples} == {"0"}  # it decides which prompts are held out
    assert samples[0]["--num_samples"] == "8"
    assert ["train only" in options for options in samples] == [True] * 3  # held-out pairs are given
    trained = [options for command, options in calls if command == "train"]
    assert [options["--model.name_or_path"] for options in trained] == policies
    assert [options["--data.train"] for options in trained] == [
        str(rig.out / f"round_{number}/data") for number in (1, 2, 3)
    ]
    assert {options["--reference.model"] for _, options in calls if "--reference.model" in options} == {
        "start"
    }
    done = json.loads((rig.out / "rounds.json").read_text())
    assert [summary["score/policy"] for summary in done] == [0.3, 0.5, 0.4]
    assert "| 2 | 0.500 [0.500, 0.500] |" in (rig.out / "rounds.md").read_text()
    assert (rig.out / "rounds.png").stat().st_size > 1000


def test_held_out_pairs_are_those_of_the_first_round(rig: Rig) -> None:
    config = rig.rounds().config
    run_rounds(rig.rounds(config=replace(config, data=DataConfig(train="d"))))
    calls = rig.called()
    samples = [options for command, options in calls if command == "sample"]
    assert ["train only" in options for options in samples] == [False, True, True]
    held_out = [options.get("--data.test") for command, options in calls if command == "evaluate"]
    assert held_out == [None, *[str(rig.out / "round_1" / "data")] * 2]


def test_iterative_dpo_is_held_to_the_policy_before_and_judged_from_the_start(rig: Rig) -> None:
    run_rounds(rig.rounds(number=2, reference="previous"))
    calls = [(command, options.get("--reference.model")) for command, options in rig.called()]
    before = str(rig.out / "round_1/run/model")
    assert calls[5:] == [
        ("precompute-ref", before), ("train", before), ("precompute-ref", "start"), ("evaluate", "start"),
    ]  # fmt: skip


def test_a_restart_goes_on_at_the_unfinished_command(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAILS", f"evaluate {rig.out / 'round_2/run'}")
    with pytest.raises(RunFailed, match="round 2: evaluate exited with status 1"):
        run_rounds(rig.rounds())
    rig.called()
    monkeypatch.delenv("FAILS")
    run_rounds(rig.rounds())
    assert [command for command, _ in rig.called()] == [
        "precompute-ref", "evaluate", "sample", "precompute-ref", "train", "evaluate",
    ]  # fmt: skip
    run_rounds(rig.rounds())
    assert rig.called() == []


def test_rounds_end_when_the_score_no_longer_rises_or_the_kl_passes_its_limit(rig: Rig) -> None:
    run_rounds(rig.rounds(kl_limit=0.5))
    assert len(json.loads((rig.out / "rounds.json").read_text())) == 1

    def summaries(*scores: float) -> list[dict[str, float]]:
        return [{"score/reference": 0.2, "score/policy": score, "kl/sequence": 1.0} for score in scores]

    def reason(*scores: float, patience: int) -> str | None:
        return reason_to_stop(summaries(*scores), kl_limit=2.0, patience=patience)

    assert reason(0.3, 0.4, patience=1) is None
    assert reason(0.3, 0.4, 0.4, patience=1) == "the score has not risen since round 2 (0.400, now 0.400)"
    assert reason(0.1, patience=1) == "the score has not risen in any round (0.200, now 0.100)"
    assert reason(0.3, 0.1, patience=2) is None
    assert reason(0.3, 0.1, 0.2, patience=2) is not None
    assert reason(0.1, 0.1, patience=0) is None
    assert (
        reason_to_stop(summaries(0.3), kl_limit=0.9, patience=0)
        == "the KL from the start is 1.00 nats, above 0.9"
    )


def test_what_is_missing_is_said_before_anything_is_started(rig: Rig) -> None:
    config = rig.rounds().config
    wrong = {
        "evaluate.scorer: none": replace(config, evaluate=EvaluateConfig()),
        "evaluate.num_prompts: 0": replace(config, evaluate=EvaluateConfig(scorer="vader", num_prompts=0)),
        "reference.model: leave it out": replace(config, reference=ReferenceConfig(model="m")),
        "model.lora.export: adapter": replace(
            config, model=ModelConfig(name_or_path="m", lora=LoraConfig(export="adapter"))
        ),
    }
    for said, bad in wrong.items():
        with pytest.raises(UserError, match=said):
            run_rounds(rig.rounds(config=bad))
    assert rig.called() == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds: 0; expected at least 1"),
        (["--rounds", "2", "--kl_limit", "0"], "--kl_limit: 0.0; expected above 0"),
        (["--rounds", "2", "--sample", "--seed 3"], "--sample: --seed is given by the rounds"),
        (["--rounds", "2", "--reference", "first"], "invalid choice"),
    ],
)
def test_bad_usage_is_one_message(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ["--model.name_or_path", "m", "--data.train", "d"]
    assert run(["rounds", *arguments, *keys]) == 2
    assert said in capsys.readouterr().err


def test_two_real_rounds(
    tiny_model: Path,
    write_jsonl: Callable[..., str],
    preference_rows: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def in_this_process(name: str, command: list[str]) -> None:  # a process each would take half a minute
        module, *words = command[2:]
        assert {"dpo": run, "data_prep": data_prep}[module](words) == 0, name

    monkeypatch.setattr(journal, "start", in_this_process)
    monkeypatch.setattr(rounds, "start", in_this_process)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    prompts, held_out = (
        write_jsonl(preference_rows(24), "p.jsonl"),
        write_jsonl(preference_rows(6), "h.jsonl"),
    )
    assert data_prep(["preferences", prompts, "--output", "prompts"]) == 0
    keys = [
        "--model.name_or_path", str(tiny_model), "--model.dtype", "float32", "--data.train", "prompts",
        "--data.test", held_out, "--evaluate.scorer", "python:lengths.of", "--evaluate.num_prompts", "4",
        "--evaluate.completion_tokens", "6", "--train.pairs_per_step", "8", "--run_dir", "runs/x",
    ]  # fmt: skip
    Path("lengths.py").write_text("def of(prompts, completions):\n    return [*map(len, completions)]\n")
    sampling = "--num_samples 3 --completion_tokens 6 --temperature 1"
    assert run(["rounds", "--rounds", "2", "--patience", "0", "--sample", sampling, *keys]) == 0
    done = json.loads(Path("runs/x_rounds/rounds.json").read_text())
    assert len(done) == 2
    assert all(summary["kl/sequence"] != 0 for summary in done)
    manifests = [json.loads(Path(f"runs/x_rounds/round_{n}/data/manifest.json").read_text()) for n in (1, 2)]
    assert all(manifest["rows"]["train"] > 3 for manifest in manifests)
