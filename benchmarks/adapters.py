"""All weights, LoRA, DoRA and QLoRA on the same steps: accuracy, KL, memory, time, and size of a checkpoint.

    python -m benchmarks.adapters --model path/to/SmolLM2-135M-Instruct --hh test.jsonl.gz
    python -m benchmarks.adapters --table            the table of docs/adapters.md, of what is done

Harmless dialogues on one process in float32. Every part is a public command that runs once; stop it and start
it again, and it continues. `--rows` does some of the rows; each takes minutes on 2 cores.
"""

import argparse
import json
import math
import statistics
import sys
from pathlib import Path

from benchmarks.study import Study, run_to_its_end
from benchmarks.study_numbers import with_ends
from dpo.commands.journal import start
from dpo.tracking.history import read_history
from dpo.tracking.run_folder import RunFolder

CONFIG = "configs/hh.yaml"
NAME = "adapters"
DATA, RUNS = Path("data") / NAME, Path("runs") / NAME
ADAPTER = ("--model.lora.rank", "16", "--model.lora.export", "adapter", "--train.learning_rate", "2e-4")
ROWS: dict[str, tuple[str, ...]] = {
    "full": ("--train.learning_rate", "1e-5"),
    "lora": ADAPTER,
    "dora": (*ADAPTER, "--model.lora.dora", "true"),
    "qlora": (*ADAPTER, "--model.quantization", "nf4"),
}
"""Name of a run -> its options. The learning rates are usual ones, not tuned."""
NAMES = {"full": "all weights", "lora": "LoRA", "dora": "DoRA", "qlora": "QLoRA (nf4)"}
PAIRS = 16
"""Of an optimizer step."""
SHARED = (
    *("--train.pairs_per_step", str(PAIRS), "--train.warmup_steps", "0", "--train.evaluate_every", "0"),
    *("--train.max_tokens_per_micro_batch", "1024", "--evaluate.watched_prompts", "0"),
    *("--evaluate.num_prompts", "24", "--evaluate.completion_tokens", "16"),
)


def main() -> None:
    """Runs what is missing, or prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="the base: a folder or a hub name")
    parser.add_argument("--hh", help="dialogues of HH-RLHF: a file or a hub name")
    parser.add_argument("--rows", default=",".join(ROWS), help="some of " + ",".join(ROWS))
    parser.add_argument(
        "--steps", type=int, default=12, help=f"optimizer steps of {PAIRS} pairs (default: 12)"
    )
    parser.add_argument("--max_rows", default="1400", help="dialogues that are read (default: 1400)")
    parser.add_argument("--max_length", default="80", help="longer dialogues are dropped (default: 80)")
    parser.add_argument("--table", action="store_true", help="print the table")
    args = parser.parse_args()
    if args.table:
        print(table())
        return
    if args.model is None or args.hh is None:
        parser.error("--model and --hh are needed to run")
    study = Study(model=args.model, config=CONFIG, name=NAME)
    prepare = ["hh", args.hh, "--fold", "1/3", "--max_rows", args.max_rows, "--output", str(DATA)]
    study.once("hh", [sys.executable, "-m", "data_prep", *prepare], DATA / "manifest.json")
    steps = ("--train.max_steps", str(args.steps), "--train.checkpoint_every", "4")
    for name in args.rows.split(","):
        keys = ["--data.train", str(DATA), "--data.max_length", args.max_length, *SHARED, *steps, *ROWS[name]]
        folder = RunFolder(RUNS / name)
        for command, product in (
            ("precompute-ref", None),
            ("train", folder.model() / "README.md"),
            ("evaluate", folder.report() / "summary.json"),
        ):
            words = [sys.executable, "-m", "dpo", command, "--config", CONFIG]
            words += ["--model.name_or_path", args.model, *keys, "--run_dir", str(folder.path)]
            if product is not None:
                study.once(command, words, product)
            elif not (folder.report() / "summary.json").is_file():
                start(command, words)  # a full cache takes seconds


def table() -> str:
    """The rows that are done, as Markdown; times are relative to those of all weights."""
    head = [
        "",
        "first loss less ln 2",
        "held-out accuracy",
        "KL, nats",
        "peak memory, GB",
        "time of a step",
        "checkpoint, MB",
        "model, MB",
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    seconds = {name: _seconds(RunFolder(RUNS / name)) for name in ROWS if _is_done(name)}
    for name, mean in seconds.items():
        folder = RunFolder(RUNS / name)
        summary = json.loads((folder.report() / "summary.json").read_text())
        history = read_history(folder)
        peak = max(line.get("perf/peak_memory_gb", 0.0) for line in history)
        first = next(line["eval/loss"] for line in history if "eval/loss" in line)
        checkpoint = next(iter(sorted((folder.path / "checkpoints").glob("step_*"))))
        relative = f"{mean / seconds['full']:.2f} x" if "full" in seconds else f"{mean:.1f} s"
        cells = [NAMES[name], f"{first - math.log(2):.0e}"]
        cells += [with_ends(summary, "eval/rewards/accuracies"), with_ends(summary, "kl/sequence", 2)]
        cells += [
            f"{peak:.2f}",
            relative,
            f"{_megabytes(checkpoint):.0f}",
            f"{_megabytes(folder.model()):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _is_done(name: str) -> bool:
    return (RunFolder(RUNS / name).report() / "summary.json").is_file()


def _seconds(folder: RunFolder) -> float:
    """Median time of an optimizer step after the first."""
    rates = [
        line["perf/pairs_per_second"] for line in read_history(folder) if "perf/pairs_per_second" in line
    ]
    return statistics.median(PAIRS / rate for rate in rates[1:])


def _megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


if __name__ == "__main__":
    run_to_its_end(main)
