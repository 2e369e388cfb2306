"""TRL's DPOTrainer with cached reference log-probs, measured in an environment of its own.

    .venv-peers/bin/python benchmarks/peers/trl_dpo.py SETTINGS WORK {precompute,train} ...

Started by benchmarks/speed.py; imports nothing of this project, which that environment does not have. TRL's
defaults hold except where they would make other work: float32 on CPUs, no gradient checkpointing (our runs
have none either), pairs in the given order, a constant learning rate from the first step on. On a GPU it has
float32 weights under bfloat16 autocast, and Liger's kernels.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found]

MAX_GRAD_NORM = 1.0


class MeasuredTrainer(DPOTrainer):  # type: ignore[misc]
    """Takes the time and the peak memory of the precompute pass, and keeps the losses."""

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Any:
        warm_up = self.data_collator([dataset[index] for index in range(batch_size)])
        self.compute_ref_log_probs(self.model, warm_up)
        _wait()
        started = time.perf_counter()
        with_logps = super()._precompute_ref_logps(dataset, name, batch_size)
        _wait()
        self.precompute_seconds = time.perf_counter() - started
        self.precompute_peak = peak_bytes()
        self.micro_losses: list[torch.Tensor] = []
        return with_logps

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """A micro-batch's mean loss, which is kept."""
        loss = super().compute_loss(*arguments, **options)
        self.micro_losses.append(loss.detach())
        return loss


class StepTimes(TrainerCallback):
    """When each optimizer step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *arguments: Any, **options: Any) -> None:
        """Called after each optimizer step."""
        _wait()
        self.ends.append(time.perf_counter())


def make_trainer(settings: dict[str, Any], work: str, output: str, times: StepTimes) -> MeasuredTrainer:
    """A trainer that has precomputed its reference log-probs."""
    folder = Path(settings["folder"])
    with (folder / work / "pairs.jsonl").open() as file:
        pairs = Dataset.from_list([json.loads(line) for line in file])
    micro_batch = settings["pairs_per_micro_batch"]
    config = DPOConfig(
        output_dir=output,
        model_init_kwargs={"dtype": "float32"},
        bf16=settings["dtype"] == "bfloat16",
        use_cpu=not settings["gpu"],
        use_liger_kernel=settings["gpu"],
        gradient_checkpointing=False,
        precompute_ref_log_probs=True,
        max_length=settings["max_length"],
        beta=settings["beta"],
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=settings["pairs_per_step"] // micro_batch,
        max_steps=settings["steps"],
        train_sampling_strategy="sequential",
        seed=settings["seed"],
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return MeasuredTrainer(str(folder / "model"), args=config, train_dataset=pairs, callbacks=[times])


def num_tokens(dataset: Dataset) -> int:
    """Tokens of all rows, without padding."""
    return sum(
        2 * len(row["prompt_ids"]) + len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in dataset
    )


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_bytes() -> int:
    """Most resident memory that this process has had; on a GPU, most that it has allocated there."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> int:
    """Prints a JSON line a task, in the form of benchmarks.speed_processes.Measurement."""
    path, work, *tasks = sys.argv[1:]
    settings = json.loads(Path(path).read_text())
    torch.set_num_threads(settings["threads"])
    disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"  # of the precompute pass
    times = StepTimes()
    with tempfile.TemporaryDirectory(dir=settings["folder"]) as output:
        trainer = make_trainer(settings, work, output, times)
        data = trainer.train_dataset
        first = settings["pairs_per_step"]
        common = {"system": "trl", "work": work}
        measured = {
            "task": "precompute",
            "pairs": len(data),
            "seconds": trainer.precompute_seconds,
            "tokens": num_tokens(data),
            "peak_bytes": trainer.precompute_peak,
            "losses": [],
        }
        if "precompute" in tasks:
            print(json.dumps(common | measured), flush=True)
        if "train" in tasks:
            trainer.train()
            parts = trainer.args.gradient_accumulation_steps
            losses = [float(loss) for loss in trainer.micro_losses]
            measured = {
                "task": "train",
                "pairs": len(data) - first,
                "seconds": times.ends[-1] - times.ends[0],
                "tokens": num_tokens(data.select(range(first, len(data)))),
                "peak_bytes": peak_bytes(),
                "losses": [sum(losses[at : at + parts]) / parts for at in range(0, len(losses), parts)],
            }
            print(json.dumps(common | measured), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
