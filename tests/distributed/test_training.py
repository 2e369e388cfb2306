"""Training on two real ranks (accelerate, DeepSpeed ZeRO-2, cache) compared with a textbook loop.

A launch takes about 15 seconds, so the tests share one run on 2 ranks, which also counts the models it loads;
what needs no launcher is forked.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
import yaml
from ranks import run_ranks
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable, "ACCELERATE_CONFIG": str(ROOT / "launch" / "cpu.yaml")}
BETA, RATE, PAIRS_PER_STEP = 0.1, 1e-3, 8


def write_config(folder: Path, model: Path, data: Path) -> Path:
    config = {
        "run_dir": str(folder / "run"),
        "model": {"name_or_path": str(model), "dtype": "float32"},
        "data": {"train": str(data), "test": str(data), "cache_dir": str(folder / "tokenized")},
        "reference": {"cache_dir": str(folder / "reference"), "max_tokens_per_batch": 256},
        "loss": {"beta": BETA},
        "train": {
            "learning_rate": RATE,
            "warmup_steps": 0,
            "pairs_per_step": PAIRS_PER_STEP,
            "max_tokens_per_micro_batch": 128,  # several micro-batches per step, not always the same number
            "checkpoint_every": 2,
            "evaluate_every": 4,
            "num_epochs": 2,
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def training(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if "train/loss" in line]


def launch_script(script: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Starts `dpo ARGUMENTS` on two ranks; each runs `code` first, which defines `after(status)`."""
    script.write_text(
        f"import os, sys\nfrom dpo.cli.main import run\n{code}\nstatus = run(sys.argv[1:])\nafter(status)\n"
    )
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        ENVIRONMENT["ACCELERATE_CONFIG"],
    ]
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["TORCH_EXTENSIONS_DIR"] = str(script.parent / "extensions")
    return subprocess.run(
        [*command, str(script), *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )


COUNT_LOADS = """
import transformers
SLOW, loads = {"matplotlib", "pandas", "datasets", "dpo.commands.evaluate"}, []
original = transformers.PreTrainedModel.from_pretrained.__func__
def counted(cls, *args, **kwargs):
    loads.append(args[0])
    return original(cls, *args, **kwargs)
transformers.PreTrainedModel.from_pretrained = classmethod(counted)
def after(status):
    sys.stdout.write(f"LOADED {len(loads)}\\n")
    sys.stdout.write(f"IMPORTED {sorted(SLOW & sys.modules.keys())}\\n")
    sys.exit(status)
"""


@dataclass(frozen=True)
class Trained:
    """A filled cache and a finished run on two ranks."""

    folder: Path
    """With config.yaml and run/."""
    output: str

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pairs_file: Path) -> Trained:
    """The one run that is started by the launcher."""
    folder = tmp_path_factory.mktemp("two_ranks")
    config = write_config(folder, tiny_model, pairs_file)
    statuses, text = run_ranks(2, ["precompute-ref", "--config", str(config)], folder / "logs")
    assert statuses == [0, 0], text
    result = launch_script(folder / "count_loads.py", COUNT_LOADS, "train", "--config", str(config))
    assert result.returncode == 0, result.stderr[-3000:]
    return Trained(folder, result.stdout)


def test_the_first_loss_is_ln_2_and_the_first_rewards_are_0(trained: Trained) -> None:
    first = training(metrics(trained.run))[0]
    assert first["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["train/rewards/chosen"] == pytest.approx(0, abs=1e-6)
    assert first["train/rewards/rejected"] == pytest.approx(0, abs=1e-6)


def test_training_from_the_cache_equals_a_textbook_loop_with_the_live_reference(trained: Trained) -> None:
    settings = yaml.safe_load((trained.folder / "config.yaml").read_text())
    folder = settings["model"]["name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    rows = [json.loads(line) for line in Path(settings["data"]["train"]).read_text().splitlines()]
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.0)

    def log_prob(model: torch.nn.Module, prompt: str, completion: str) -> torch.Tensor:
        start = tokenizer(prompt).input_ids
        ids = torch.tensor([start + tokenizer(completion).input_ids + [tokenizer.eos_token_id]])
        logps = torch.log_softmax(model(input_ids=ids).logits[0, :-1], dim=-1)
        return logps.gather(1, ids[0, 1:, None])[len(start) - 1 :].sum()

    from dpo.data.plan import plan_steps

    recorded = training(metrics(trained.run))
    for epoch in range(2):
        plan = plan_steps(
            torch.ones(len(rows), dtype=torch.int64).numpy(),
            seed=0,
            epoch=epoch,
            pairs_per_step=PAIRS_PER_STEP,
        )
        for start, stop in zip(plan.offsets[:-1], plan.offsets[1:], strict=True):
            losses = []
            for index in plan.order[start:stop]:
                row = rows[index]
                chosen, rejected = (
                    log_prob(policy, row["prompt"], row[side]) for side in ("chosen", "rejected")
                )
                with torch.no_grad():
                    ref_chosen = log_prob(reference, row["prompt"], row["chosen"])
                    ref_rejected = log_prob(reference, row["prompt"], row["rejected"])
                losses.append(-F.logsigmoid(BETA * ((chosen - ref_chosen) - (rejected - ref_rejected))))
            loss = torch.stack(losses).mean()
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            step = recorded.pop(0)
            assert step["train/loss"] == pytest.approx(loss.item(), abs=1e-5)
            assert step["train/grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    assert recorded == []
    exported = AutoModelForCausalLM.from_pretrained(trained.run / "model", dtype=torch.float32)
    # Compares logits, not weights: the gradient of a key bias is only rounding error, which Adam amplifies.
    ids = tokenizer(rows[0]["prompt"] + rows[0]["chosen"], return_tensors="pt").input_ids
    torch.testing.assert_close(exported(ids).logits, policy(ids).logits, rtol=1e-3, atol=1e-3)


def test_every_rank_loads_exactly_one_model(trained: Trained) -> None:
    assert trained.output.count("LOADED 1\n") == 2


def test_no_rank_imports_what_training_does_not_need(trained: Trained) -> None:
    """Each of them takes every start half a second or more."""
    assert trained.output.count("IMPORTED []\n") == 2


def test_nothing_is_compiled(trained: Trained) -> None:
    """DeepSpeed's op for inference on CPUs needs g++, and a machine's first start waits for it."""
    assert not [*(trained.folder / "extensions").rglob("*")]


def test_missing_cache_rows_stop_training_with_status_2_and_name_the_command(
    trained: Trained, tmp_path: Path
) -> None:
    keys = ["--run_dir", str(tmp_path / "run"), "--reference.cache_dir", str(tmp_path / "empty")]
    statuses, text = run_ranks(
        2, ["train", "--config", str(trained.folder / "config.yaml"), *keys], tmp_path / "logs"
    )
    assert statuses == [2, 2], text
    record = json.loads((tmp_path / "run" / "exit.json").read_text())  # what launch/run ends with
    assert record["status"] == 2
    assert "precompute-ref" in record["message"]
