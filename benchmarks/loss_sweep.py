"""Every loss on the demo, with one reference cache: the last table of docs/losses.md.

    make demo && python -m benchmarks.loss_sweep

Trains and evaluates the demo's experiment with each loss in runs/losses/NAME (finished runs are skipped),
checks that no reference log-prob is computed after the demo's own, and prints the table. Each loss has a
beta of its usual size, without tuning.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

from dpo.loss.catalog import LOSSES
from dpo.report import labels

CONFIG = "configs/demo.yaml"
OPTIONS = {
    "robust": ["--loss.label_smoothing", "0.1"],
    "exo_pair": ["--loss.label_smoothing", "0.001"],
    "sigmoid_norm": ["--loss.beta", "5"],
    "simpo": ["--loss.beta", "2"],
}
COLUMNS = (
    "positive_share/policy",
    "win_rate",
    "eval/rewards/accuracies",
    "kl/sequence",
    "distinct_2/policy",
)


def stage(command: str, *keys: str) -> str:
    """Runs a stage on the CPU, like launch/demo; returns its output."""
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "ACCELERATE_CONFIG": "launch/cpu.yaml",
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    run = ["launch/run", command, "--config", CONFIG, *keys, "--quiet"]
    return subprocess.run(run, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    """Runs what is missing, and prints one row per loss."""
    print("| loss | options | " + " | ".join(map(labels.short, COLUMNS)) + " |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for name in LOSSES:
        run_dir = Path("runs/losses") / name
        options = OPTIONS.get(name, [])
        keys = ["--run_dir", str(run_dir), "--loss.type", name, *options]
        summary = run_dir / "report" / "summary.json"
        if not summary.is_file():
            output = stage("precompute-ref", *keys)
            if " 0 computed" not in output and "not needed" not in output:
                sys.exit(f"{name}: the reference was computed again:\n{output}")
            stage("train", *keys)
            stage("evaluate", *keys)
        found = json.loads(summary.read_text())
        shown = ", ".join(
            f"{key.removeprefix('--loss.').replace('_', ' ')} {value}"
            for key, value in zip(options[::2], options[1::2], strict=True)
        )
        cells = [f"{found[column]:.3f}" for column in COLUMNS]
        print(f"| `{name}` | {shown} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
