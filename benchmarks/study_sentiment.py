"""The sentiment experiment of the DPO paper on other data: continuations of books; see docs/results.md.

    make study MODEL=path/to/model BOOKS=books.txt

Every part is a public command that runs once: stop the study and start it again, and it continues.
benchmarks.study_report makes tables and figures of the runs.
"""

import json
import os
import sys

from benchmarks.study import Study, parser, run_to_its_end
from benchmarks.study_reward import rewards_of_samples

CONFIG, NAME = "configs/books.yaml", "study"
BETAS = "0.05,0.1,0.3,1"
SNAPSHOT_EVERY = 35
SFT_RATES = (0.6, 2, 6)
"""Learning rates of preferred-FT, in units of the configuration's; the second one's has snapshots."""
REWARDS = "rewards.json"
"""File in the folder of runs: how well the policies' rewards predict the score."""
CURVE_STEPS = (3, 6, 12, 25, 50)
"""Optimizer steps of the learning curve's runs, 64 pairs per step; the main run is its last point."""


def main() -> None:
    """Runs what is missing."""
    options = parser(__doc__, config=CONFIG, name=NAME)
    options.add_argument(
        "--books", required=True, help="text that it was not trained on, as for data_prep sample"
    )
    args = options.parse_args()
    study = Study(model=args.model, config=args.config, name=args.name)
    dtype, runs = study.settings["model"]["dtype"], study.runs

    books = study.data / "books"
    sample = ["sample", args.books, "--model", args.model, "--dtype", dtype, "--scorer", "vader"]
    sample += ["--num_prompts", "2200", "--num_test_prompts", "520", "--prompt_tokens", "64"]
    sample += ["--num_samples", "4", "--completion_tokens", "24", "--temperature", "1", "--batch_size", "128"]
    command = launched("data_prep", *sample, "--output", str(books))
    study.once("sample", command, books / "manifest.json")
    data = ["--data.train", str(books), "--train.evaluate_every", "0"]

    # Four betas with snapshots, fine-tuning on the chosen completions, and best of n from the reference.
    low, middle, high = sft_rates(study)
    frontier = [sys.executable, "-m", "dpo", "frontier", "--config", args.config]
    frontier += ["--model.name_or_path", args.model, *data, "--betas", BETAS]
    frontier += ["--snapshot_every", str(SNAPSHOT_EVERY), "--sft_learning_rate", middle]
    frontier += ["--best_of", "--output", str(runs / "frontier")]
    study.once("frontier", frontier, runs / "frontier" / "frontier.json")

    # Controls: flipped labels and random labels.
    for labels in ("flipped", "shuffled"):
        folder = study.data / labels
        prepare = ["preferences", str(books), "--labels", labels, "--output", str(folder)]
        study.once(labels, [sys.executable, "-m", "data_prep", *prepare], folder / "manifest.json")
        keys = ["--data.train", str(folder), "--train.evaluate_every", "0"]
        study.precompute(labels, *keys)  # shuffled labels can pair completions that had no pair before
        study.train(labels, *keys)
        study.evaluate(labels, *keys)

    # Fine-tuning on the chosen completions at other learning rates.
    for rate in (low, high):
        folder = runs / f"sft_{rate}"
        keys = ["--model.name_or_path", args.model, "--model.dtype", dtype, "--run_dir", str(folder)]
        keys += ["--data.train", str(books), "--data.max_length", str(study.settings["data"]["max_length"])]
        keys += ["--train.schedule", "constant", "--train.warmup_steps", "150", "--train.learning_rate", rate]
        budget = study.settings["train"]["max_tokens_per_micro_batch"]
        keys += ["--train.max_tokens_per_micro_batch", str(budget)]
        study.once("sft", ["launch/run", "sft", *keys], folder / "model" / "README.md")
        study.evaluate(folder.name, *data)

    # Another seed, and groups split into independent pairs.
    for run, keys in {
        "seed_1": ["--train.seed", "1"],
        "independent_pairs": ["--data.group_pairs", "false"],
    }.items():
        study.train(run, *data, *keys)
        study.evaluate(run, *data, *keys)

    # The same run with masters that start on bfloat16 values, and without bfloat16, with a cache of its own.
    if dtype == "bfloat16":
        study.train("undithered", *data, "--train.dither_masters", "false")
        study.evaluate("undithered", *data, "--train.dither_masters", "false")
        exact = [*data, "--model.dtype", "float32"]
        study.precompute("float32", *exact)
        study.train("float32", *exact)
        study.evaluate("float32", *exact)

    # Held-out accuracy against training pairs: each point is a run of its own.
    for steps in CURVE_STEPS:
        study.train(f"steps_{steps}", *data, "--train.max_steps", str(steps))

    if not (runs / REWARDS).is_file():
        policies = {f"DPO, beta {beta}": runs / "frontier" / f"beta_{beta}" for beta in BETAS.split(",")}
        samples = runs / "frontier" / "reference" / "best_of" / "samples.jsonl"
        found = rewards_of_samples(args.model, policies, samples)
        (runs / REWARDS).write_text(json.dumps(found, indent=1))


def sft_rates(study: Study) -> list[str]:
    """The learning rates of preferred-FT, as in 3e-05."""
    return [f"{factor * study.settings['train']['learning_rate']:.0e}" for factor in SFT_RATES]


def launched(module: str, *arguments: str) -> list[str]:
    """The command that runs one of our modules on all ranks of this machine."""
    config = os.environ.get("ACCELERATE_CONFIG", "launch/cpu.yaml")
    return [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        config,
        "-m",
        module,
        *arguments,
    ]


if __name__ == "__main__":
    run_to_its_end(main)
