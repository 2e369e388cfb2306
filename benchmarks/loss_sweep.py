"""Every loss on the demo, with one reference cache: the tables of docs/losses.md.

    make demo && python -m benchmarks.loss_sweep [NAME ...]

Trains and evaluates the demo's experiment with each loss in runs/losses/NAME (finished runs are skipped),
checks that no reference log-prob of a completion is computed after the demo's own, and prints the table. Each
loss has a beta of its usual size, without tuning. `labels/NAME` trains on completions with labels: of each
prompt's pair one side alone, by turns the chosen one, labelled true, and the rejected one, labelled false.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

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


LABELLED = [f"labels/{name}" for name in ("kto", "bco_pair", "apo_zero")]
LABELS = Path("runs/losses/labels.jsonl")


def write_labels(pairs: Path, labels: Path) -> None:
    """Writes one labelled completion of each prompt, by turns a desirable and an undesirable one."""
    labels.parent.mkdir(parents=True, exist_ok=True)
    with labels.open("w") as file:
        for number, row in enumerate(pq.read_table(pairs).to_pylist()):
            side = ("rejected", "chosen")[number % 2]
            completion = row["completions"][row["pairs"][0][side]]
            file.write(
                json.dumps({"prompt": row["prompt"], "completion": completion, "label": side == "chosen"})
                + "\n"
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
    write_labels(Path("data/demo/train.parquet"), LABELS)
    print("| loss | options | " + " | ".join(map(labels.short, COLUMNS)) + " |")
    print("|---" * (2 + len(COLUMNS)) + "|")
    for name in sys.argv[1:] or [*LOSSES, *LABELLED]:
        run_dir, loss = Path("runs/losses") / name, name.rpartition("/")[2]
        options = OPTIONS.get(loss, [])
        keys = ["--run_dir", str(run_dir), "--loss.type", loss, *options]
        if name in LABELLED:
            keys += ["--data.train", str(LABELS), "--data.test", "data/demo/test.parquet"]
            keys += ["--data.append_eos", "false"]
        summary = run_dir / "report" / "summary.json"
        if not summary.is_file():
            output = stage("precompute-ref", *keys)
            if " 0 computed" not in output and "not needed" not in output and not LOSSES[loss].mismatched:
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
