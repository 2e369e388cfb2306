"""Harmless dialogues in 5 folds: accuracy against training pairs, and losses by paired differences.

    make study-harmless MODEL=path/to/model HH=test.jsonl.gz

One fold of about 190 pairs is too small (an interval of 7 points either way); five folds hold out every pair
once, and losses are compared on the same folds. Folds are split by first turn: no dialogue's beginning is in
both parts. Every run is a public command that runs once: stop the study and start it again, and it continues.
"""

import sys

from benchmarks.study import Study, parser, run_to_its_end

CONFIG, NAME = "configs/hh.yaml", "study_hh"
FOLDS = 5
CURVE_STEPS = (4, 8, 16)
"""Optimizer steps of the learning curve's runs, 32 pairs per step; the full runs are its last point."""
LOSSES = {
    "ipo": ("--loss.type", "ipo"),
    "simpo": ("--loss.type", "simpo", "--loss.beta", "2"),
    "sigmoid_norm": ("--loss.type", "sigmoid_norm", "--loss.beta", "5"),
    "apo_zero": ("--loss.type", "apo_zero"),
}
"""Compared with DPO at the configuration's beta; each with a beta that suits it, not tuned further."""
LORA_RATE = 20
"""Learning rate of the adapter, in units of the configuration's."""


def main() -> None:
    """Runs what is missing."""
    arguments = parser(__doc__, config=CONFIG, name=NAME)
    arguments.add_argument("--hh", required=True, help="dialogues of HH-RLHF: a file or a hub name")
    arguments.add_argument("--max_length", default="160", help="longer dialogues are dropped (default: 160)")
    arguments.add_argument("--format", default="text", help="text, or messages for a chat model's template")
    args = arguments.parse_args()
    study = Study(model=args.model, config=args.config, name=args.name)
    folds = {number: study.data / f"fold_{number}" for number in range(1, FOLDS + 1)}
    for number, folder in folds.items():
        prepare = ["hh", args.hh, "--fold", f"{number}/{FOLDS}", "--format", args.format]
        prepare += ["--output", str(folder)]
        study.once("hh", [sys.executable, "-m", "data_prep", *prepare], folder / "manifest.json")

    def keys(number: int) -> list[str]:
        data = ["--data.train", str(folds[number]), "--data.max_length", args.max_length]
        return [*data, "--train.evaluate_every", "0", "--evaluate.watched_prompts", "0"]

    study.precompute("fold_1/dpo", *keys(1))  # every fold contains all pairs, in one part or the other
    for number in folds:
        study.train(f"fold_{number}/dpo", *keys(number))
    for number in folds:
        for steps in CURVE_STEPS:
            study.train(f"fold_{number}/steps_{steps}", *keys(number), "--train.max_steps", str(steps))
    for loss, options in LOSSES.items():
        for number in folds:
            study.train(f"fold_{number}/{loss}", *keys(number), *options)
    rate = LORA_RATE * study.settings["train"]["learning_rate"]
    lora = ["--model.lora.rank", "16", "--train.learning_rate", f"{rate:.0e}"]
    for number in folds:
        study.train(f"fold_{number}/lora", *keys(number), *lora)
    study.evaluate("fold_1/dpo", *keys(1))  # replies of reference and policy, and their lengths


if __name__ == "__main__":
    run_to_its_end(main)
