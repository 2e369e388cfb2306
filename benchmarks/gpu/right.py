"""The prepared run, part A: is everything right on a card?

    python -m benchmarks.gpu.right [--rehearse]

The card's ceilings; the whole pipeline in bfloat16 without DeepSpeed, on ZeRO-2 and on ZeRO-3; a
deterministic run that is stopped and resumed; compilations and host waits; the unit tests that need a card.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import flex_attention
from transformers import LlamaConfig

from benchmarks.gpu.report import Report, device, options
from benchmarks.gpu.work import TINY, batch_of, groups_of, random_model, seconds_of
from dpo.config import ScratchConfig
from dpo.files import sha256_of
from dpo.model import attention
from dpo.model.from_scratch import scratch_tokenizer
from dpo.model.scorer import SequenceScorer
from dpo.tracking.history import curve, read_history
from dpo.tracking.run_folder import RunFolder

ROOT = Path(__file__).parents[2]
WORDS = ("the", "cat", "day", "good", "bad", "film", "well", "mat", "we", "like", "ended", "on")
LAUNCHERS = {
    "without DeepSpeed": "launch/one_process.yaml",
    "ZeRO-2": "launch/one_gpu.yaml",
    "ZeRO-3": "launch/one_node_zero3.yaml",
}
STEPS, REHEARSED_STEPS, STOP_AFTER = 60, 36, 2
LN_2 = math.log(2)
AUDIT = re.compile(r"largest difference (\S+) nats, (\d+)% of the tolerance")


def main() -> int:
    """Runs every section and returns the exit status."""
    given = options("right", __doc__)
    report = Report("right", given.rehearse, given.output, given.seconds)
    report.section("ceilings", partial(ceilings, report))
    report.section("compilations and waits", partial(compilations, report))
    with tempfile.TemporaryDirectory() as folder:
        pipeline = Pipeline(Path(folder), report)
        report.section("work", pipeline.prepare)
        for name in ["without DeepSpeed"] if given.rehearse else LAUNCHERS:
            report.section(f"pipeline {name}", partial(pipeline.run, name))
        report.section("stopped and resumed", pipeline.stop_and_resume)
    report.section("unit tests on a card", partial(unit_tests, report))
    return report.finish()


def ceilings(report: Report) -> None:
    """What the card does at best: products, copies, launches."""
    size = 256 if report.rehearse else 8192
    left = torch.randn(size, size, dtype=torch.bfloat16, device=device())
    product = seconds_of(lambda: left @ left)
    report.number("bfloat16 product", 2 * size**3 / product / 1e12, "TFLOP/s", low=550)
    block = torch.zeros(2**20 if report.rehearse else 2**30, dtype=torch.float32, device=device())
    target = torch.empty_like(block)
    copied = seconds_of(lambda: target.copy_(block))
    report.number("copy, bytes read and written", 2 * block.nbytes / copied / 1e12, "TB/s", low=2.5)
    small = torch.zeros(8, device=device())

    def launches() -> None:
        for _ in range(1000):
            small.add_(1)

    report.number("launch of an operation", 1e3 * seconds_of(launches), "us", high=8)


def compilations(report: Report) -> None:
    """Rows of many widths must not compile again, and a micro-batch must not wait for the device."""
    on_card = device().type == "cuda"
    if not on_card:  # without gradients, and without compiling kernels for half a minute
        attention.compiled_flex = torch.compile(flex_attention, fullgraph=True, backend="aot_eager")
    model = random_model(LlamaConfig(**{**TINY, "head_dim": 16}), torch.float32, device())
    scorer = SequenceScorer(model, flex=True)
    counters.clear()
    with torch.set_grad_enabled(on_card):
        for number in range(3 if report.rehearse else 12):
            batch = batch_of(
                groups_of(400 + 300 * number, 600, seed=number), "flex", device(), scorer.windows
            )
            logps = scorer(batch)
            if on_card:
                logps.sum().backward()
    report.number(
        "graphs of attention for all widths", counters["stats"]["unique_graphs"], "", high=4, speed=False
    )
    if on_card:
        report.number("waits in a micro-batch", _waits(scorer, batch), "", high=0)


def _waits(scorer: SequenceScorer, batch: Any) -> int:
    """How often the host waits for the card in a forward and backward pass."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            scorer(batch).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


class Pipeline:
    """The commands, as a person runs them, on a small model with random weights."""

    def __init__(self, folder: Path, report: Report) -> None:
        """Does nothing yet.

        Args:
            folder: Where model, data, cache and runs are written.
            report: Takes the numbers.
        """
        self._folder, self._report = folder, report
        self._config = folder / "config.yaml"
        self._steps = REHEARSED_STEPS if report.rehearse else STEPS

    def prepare(self) -> None:
        """Writes the model, its tokenizer, preferences and the configuration."""
        corpus = [f"{word} {other}" for word in WORDS for other in WORDS]
        tokenizer = scratch_tokenizer(ScratchConfig(config="", vocab_size=400), corpus * 4)
        tokenizer.save_pretrained(self._folder / "model")
        sizes = TINY if self._report.rehearse else {**TINY, "hidden_size": 512, "intermediate_size": 2048}
        layers = 2 if self._report.rehearse else 8
        config = LlamaConfig(**{**sizes, "num_hidden_layers": layers, "vocab_size": len(tokenizer)})
        model = random_model(config, torch.bfloat16, device())
        model.config.bos_token_id = model.config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.bos_token_id = model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.cpu().save_pretrained(self._folder / "model")
        rng, rows = np.random.default_rng(0), []
        for number in range(48 if self._report.rehearse else 960):
            prompt, chosen, rejected = (
                " ".join(rng.choice(WORDS, int(rng.integers(2, 30)))) for _ in range(3)
            )
            rows.append({"prompt": f"{number} {prompt}", "chosen": f" {chosen}", "rejected": f" {rejected}"})
        for name, part in (("train", rows[8:]), ("test", rows[:8])):
            (self._folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        self._config.write_text(
            json.dumps(  # YAML reads it too
                {
                    "model": {"name_or_path": str(self._folder / "model"), "dtype": "bfloat16"},
                    "data": {
                        "train": str(self._folder / "train.jsonl"),
                        "test": str(self._folder / "test.jsonl"),
                        "cache_dir": str(self._folder / "tokenized"),
                    },
                    "reference": {"cache_dir": str(self._folder / "reference")},
                    "train": {
                        "pairs_per_step": 8,
                        "num_epochs": 8,
                        "max_steps": self._steps,
                        "learning_rate": 1e-4,
                    },
                    "evaluate": {"num_prompts": 4, "completion_tokens": 8},
                }
            )
        )

    def run(self, name: str) -> None:
        """Precompute, train and evaluate under one launcher; a rehearsal trains in the next section."""
        run = self._folder / f"run {name}"
        commands = ["precompute-ref", *([] if self._report.rehearse else ["train", "evaluate"])]
        for command in commands:
            began = time.monotonic()
            output = self._stage(LAUNCHERS[name], command, run)
            self._report.number(f"{command}, seconds", time.monotonic() - began, "s")
            if command == "train":
                self._judge(run, output)

    def _judge(self, run: Path, output: str) -> None:
        """What a training must show: an audit within its tolerance, and a first loss of ln 2."""
        if found := AUDIT.search(output):
            self._report.number("audit, largest difference", float(found[1]), "nats", high=1)
            self._report.number("audit, of the tolerance", float(found[2]), "%", high=50, speed=False)
        first = self._losses(run)[0]
        self._report.number("first loss less ln 2", abs(first - LN_2), "nats", high=0.02, speed=False)

    def stop_and_resume(self) -> None:
        """A deterministic run that is stopped by a signal and resumed ends with the same bits as another."""
        keys = ("--train.deterministic", "true", "--train.checkpoint_every", "1")
        whole, stopped = self._folder / "whole", self._folder / "stopped"
        launcher = LAUNCHERS["without DeepSpeed"]
        self._judge(whole, self._stage(launcher, "train", whole, *keys))
        process = subprocess.Popen(
            self._words("train", stopped, *keys), cwd=ROOT, env=self._environment(launcher)
        )
        while process.poll() is None and len(self._losses(stopped)) < STOP_AFTER:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        self._report.number("status after the signal", process.wait(), "", speed=False)
        done = len(self._losses(stopped))
        self._report.number("steps before the stop", done, "", low=1, high=self._steps - 1, speed=False)
        self._stage(launcher, "train", stopped, *keys)
        digests = [sha256_of(run / "model" / "model.safetensors") for run in (whole, stopped)]
        self._report.number("weights that differ", float(digests[0] != digests[1]), "", high=0, speed=False)

    def _stage(self, launcher: str, command: str, run: Path, *keys: str) -> str:
        """What a stage prints; RuntimeError if it fails."""
        ended = subprocess.run(
            self._words(command, run, *keys),
            cwd=ROOT,
            env=self._environment(launcher),
            capture_output=True,
            text=True,
            check=False,
        )
        if ended.returncode != 0:
            raise RuntimeError((ended.stdout + ended.stderr)[-2000:])
        return ended.stdout + ended.stderr

    def _words(self, command: str, run: Path, *keys: str) -> list[str]:
        config = ["--config", str(self._config), "--run_dir", str(run), *keys]
        return ["launch/run", command, *config]

    def _environment(self, launcher: str) -> dict[str, str]:
        return {**os.environ, "PYTHON": sys.executable, "ACCELERATE_CONFIG": launcher, "NPROC": "1"}

    def _losses(self, run: Path) -> list[float]:
        return curve(read_history(RunFolder(run)), "train/loss")[1]


def unit_tests(report: Report) -> None:
    """The tests marked `gpu`; without a card they are skipped."""
    words = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/unit/model/test_on_gpu.py"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    print(ended.stdout[-3000:])
    report.number("exit status of the tests", ended.returncode, "", high=0, speed=False)
    passed = re.search(r"(\d+) passed", ended.stdout)
    report.number("tests that passed", float(passed[1]) if passed else 0, "", low=1)


if __name__ == "__main__":
    sys.exit(main())
