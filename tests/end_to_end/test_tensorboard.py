"""What a running TensorBoard shows, over HTTP, for a run that was interrupted and resumed."""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

import numpy as np
import pytest

from dpo.tracking.metrics import Evaluation
from dpo.tracking.monitor import MARGINS, Monitor
from dpo.tracking.run_folder import RunFolder

NAMES = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def train(run_dir: Path, first_step: int, last_step: int, *, offset: float) -> None:
    """Records what a run of these steps would; `offset` marks values that the resumed run must replace."""
    with Monitor(RunFolder(run_dir), num_steps=9, first_step=first_step, unit="pairs") as monitor:
        monitor.text("config", "```yaml\nloss: {beta: 0.1}\n```")
        for step in range(first_step, last_step + 1):
            if step > first_step:
                monitor.record(step, {f"train/{name}": step + offset for name in NAMES})
            if step % 2 == 0 and (step > first_step or step == 0):
                values = {f"eval/{name}": step + offset for name in NAMES}
                samples = f"| query | policy |\n|---|---|\n| q | at {step + offset} |"
                margins = np.linspace(-1, 1, 20) + step
                monitor.show(step, Evaluation(values=values, margins=margins, samples=samples))


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of a TensorBoard server, and the folder of the run that it shows."""
    run_dir = tmp_path_factory.mktemp("runs") / "mine"
    run_dir.mkdir()
    train(run_dir, 0, 6, offset=0.5)
    train(run_dir, 4, 9, offset=0.0)  # steps 5 and 6 came after the last checkpoint and are repeated
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run_dir.parent), "--port", str(port)]
    with subprocess.Popen(
        [*command, "--host", "localhost", "--load_fast", "false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            yield wait_for(f"http://localhost:{port}"), run_dir
        finally:
            server.terminate()


def wait_for(address: str) -> str:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        try:
            tags = ask(f"{address}/data/plugin/scalars/tags").values()
            texts = ask(f"{address}/data/plugin/text/tags").values()
            if any("eval/loss" in of for of in tags) and any(
                len(of) == 2 for of in texts
            ):  # everything is loaded
                return address
        except (URLError, ConnectionError):
            pass
        time.sleep(0.2)
    raise AssertionError("TensorBoard did not start")


def ask(url: str) -> Any:
    with urlopen(url, timeout=30) as answer:
        return json.loads(answer.read())


def test_the_run_has_all_tags(shown: tuple[str, Path]) -> None:
    address, _ = shown
    (run,) = ask(f"{address}/data/runs")
    tags = ask(f"{address}/data/plugin/scalars/tags")[run]
    assert tags.keys() == {f"{split}/{name}" for split in ("train", "eval") for name in NAMES}
    assert set(ask(f"{address}/data/plugin/histograms/tags")[run]) == {MARGINS}
    assert set(ask(f"{address}/data/plugin/text/tags")[run]) == {
        "config/text_summary",
        "eval/samples/text_summary",
    }


@pytest.mark.parametrize("split", ["train", "eval"])
def test_curves_have_each_step_once_after_a_resume_and_equal_metrics_jsonl(
    shown: tuple[str, Path], split: str
) -> None:
    address, run_dir = shown
    (run,) = ask(f"{address}/data/runs")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for name in NAMES:
        tag = f"{split}/{name}"
        points = ask(f"{address}/data/plugin/scalars/scalars?run={quote(run)}&tag={quote(tag)}")
        assert [(step, value) for _, step, value in points] == [
            (line["step"], line[tag]) for line in lines if tag in line
        ]
        steps = [step for _, step, _ in points]
        assert steps == sorted(set(steps))


def test_charts_combine_chosen_with_rejected_and_training_with_held_out(shown: tuple[str, Path]) -> None:
    address, _ = shown
    layout = ask(f"{address}/data/plugin/custom_scalars/layout")
    charts = {
        chart["title"]: chart["multiline"]["tag"] for part in layout["category"] for chart in part["chart"]
    }
    assert charts["loss"] == ["train/loss", "eval/loss"]
    assert charts["rewards, training"] == ["train/rewards/chosen", "train/rewards/rejected"]


def test_samples_of_every_evaluation_are_shown(shown: tuple[str, Path]) -> None:
    address, _ = shown
    (run,) = ask(f"{address}/data/runs")
    texts = ask(f"{address}/data/plugin/text/text?run={quote(run)}&tag={quote('eval/samples/text_summary')}")
    assert [text["step"] for text in texts] == [0, 2, 4, 6, 8]
    first_start = [text["step"] for text in texts if "at 4.5" in text["text"]]
    assert first_start == [4]  # at the last checkpoint, so not repeated
    resumed = [text["step"] for text in texts if "at 6.0" in text["text"]]
    assert resumed == [6]  # after the last checkpoint, so replaced by the resumed run
    assert all("<table>" in text["text"] for text in texts)
