"""Runs in processes started by benchmarks.speed: prepares the work, and measures this system.

python -m benchmarks.speed_work {prepare,precompute,train,profile,peak} SETTINGS [WORK]
"""

import json
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.speed_data import prepare
from benchmarks.speed_processes import Measurement, Settings
from dpo import distributed
from dpo.cli.main import run
from dpo.cli.parse import parse
from dpo.commands.inputs import open_data
from dpo.config import Config
from dpo.errors import UserError
from dpo.reference.precompute import precompute
from dpo.reference.store import reference_store
from dpo.train import loop

PEAK_SHAPE, PEAK_SHAPE_OF_GPU = (512, 768, 3072), (8192, 8192, 8192)
PEAK_SAMPLES, PRODUCTS_PER_SAMPLE = 30, 10

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("scaled_dot_product",),
    "optimizer and gradient norm": ("adamw", "vector_norm", "_foreach"),
    "GELU and layer norm": ("gelu", "layer_norm"),
    "filling, copying, joining": ("fill_", "copy_", "aten::cat", "zero_", "aten::empty"),
    "other elementwise operations and sums": (
        *("aten::add", "aten::sub", "aten::mul", "aten::exp", "aten::sum", "aten::div", "aten::amax"),
        *("logsumexp", "logaddexp", "aten::where", "scatter", "gather", "index", "embedding"),
    ),
}
"""Of operations, by parts of their names; the first that fits counts."""


def config_of(settings: Settings, work: str, command: str, run_dir: Path) -> list[str]:
    """The arguments of `dpo COMMAND` for a work."""
    folder = settings.work(work)
    values = {
        "run_dir": run_dir,
        "model.name_or_path": settings.model,
        "model.dtype": settings.dtype,
        "data.train": folder / "groups.jsonl",
        "data.max_length": settings.max_length,
        "data.append_eos": "true",
        "data.cache_dir": folder / "tokenized",
        "reference.cache_dir": folder / "reference",
        "reference.max_tokens_per_batch": settings.max_tokens_per_micro_batch,
        "loss.beta": settings.beta,
        "train.learning_rate": settings.learning_rate,
        "train.warmup_steps": 0,
        "train.pairs_per_step": settings.pairs_per_step,
        "train.max_tokens_per_micro_batch": settings.max_tokens_per_micro_batch,
        "train.seed": settings.seed,
    }
    return [command, *(word for key, value in values.items() for word in (f"--{key}", str(value)))]


def measure_precompute(settings: Settings, work: str) -> None:
    """Fills an empty cache, on every rank that the launcher started, as `dpo precompute-ref` does."""
    distributed.start()
    command, *keys = config_of(settings, work, "precompute-ref", settings.work(work) / "run")
    config = cast(Config, parse(command, keys))
    if distributed.is_main():
        shutil.rmtree(config.reference.cache_dir, ignore_errors=True)
    distributed.barrier()
    dataset, _, _ = open_data(config.data, config.model)
    store = reference_store(config.model, Path(config.reference.cache_dir))
    result = precompute(config.model, config.reference, [dataset], store)
    peak = sum(distributed.gather_objects(peak_bytes(settings)))
    if distributed.is_main():
        Measurement(
            system="ours",
            work=work,
            task="precompute",
            pairs=len(dataset.pairs),
            seconds=result.seconds,
            tokens=int(dataset.tree_tokens.sum()),
            peak_bytes=peak,
            losses=[],
        ).print()


def measure_train(settings: Settings, work: str) -> None:
    """Runs `dpo train` in this process and reads what it recorded."""
    with tempfile.TemporaryDirectory(dir=settings.work(work)) as folder:
        run_dir = Path(folder) / "run"
        if status := run(config_of(settings, work, "train", run_dir)):
            sys.exit(status)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    assert len(steps) == settings.steps
    pairs = settings.pairs_per_step
    Measurement(
        system="ours",
        work=work,
        task="train",
        pairs=pairs * (len(steps) - 1),
        seconds=sum(pairs / step["perf/pairs_per_second"] for step in steps[1:]),
        tokens=int(steps[-1]["train/num_tokens"] - steps[0]["train/num_tokens"]),
        peak_bytes=peak_bytes(settings),
        losses=[step["train/loss"] for step in steps],
    ).print()


def profile_train(settings: Settings, work: str) -> None:
    """Prints the seconds that the last optimizer step of `dpo train` spends on each kind of operation."""
    seconds: Counter[str] = Counter()
    plain = loop.train_step

    def profiled(*arguments: Any) -> tuple[dict[str, float], str | None, bool]:
        if arguments[2].number < settings.steps:
            return plain(*arguments)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            metrics = plain(*arguments)
        for operation in found.key_averages():
            seconds[kind_of(operation.key)] += operation.self_cpu_time_total / 1e6
        return metrics

    loop.train_step = profiled  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(dir=settings.work(work)) as folder:
        if status := run(config_of(settings, work, "train", Path(folder) / "run")):
            sys.exit(status)
    print(json.dumps({"seconds": dict(seconds.most_common())}))


def kind_of(operation: str) -> str:
    """Which line of the profile an operation of PyTorch belongs to."""
    for kind, names in KINDS.items():
        if any(name in operation for name in names):
            return kind
    return "everything else"


def peak_bytes(settings: Settings) -> int:
    """Most resident memory that this process has had; on a GPU, most that it has allocated there."""
    if settings.gpu:
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_peak(settings: Settings) -> None:
    """Prints the best rate of a matrix product on all threads, in the systems' compute type."""
    torch.set_num_threads(settings.threads)
    device, dtype = "cuda" if settings.gpu else "cpu", getattr(torch, settings.dtype)
    rows, inner, columns = PEAK_SHAPE_OF_GPU if settings.gpu else PEAK_SHAPE
    left = torch.randn(rows, inner, device=device, dtype=dtype)
    right = torch.randn(inner, columns, device=device, dtype=dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    seconds = []
    for _ in range(PEAK_SAMPLES):
        started = time.perf_counter()
        for _ in range(PRODUCTS_PER_SAMPLE):
            torch.mm(left, right, out=out)
        if settings.gpu:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started) / PRODUCTS_PER_SAMPLE)
    print(json.dumps({"flops_per_second": 2 * rows * inner * columns / min(seconds)}))


def main() -> int:
    """Runs one action; 2 for bad data."""
    action, path, *work = sys.argv[1:]
    settings = Settings.read(path)
    try:
        if action == "peak":
            measure_peak(settings)
        else:
            {
                "prepare": prepare,
                "precompute": measure_precompute,
                "train": measure_train,
                "profile": profile_train,
            }[action](settings, *work)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
