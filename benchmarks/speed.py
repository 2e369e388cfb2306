"""Throughput and peak memory of this system, of the textbook path, and of TRL's DPOTrainer, on the same work.

    python -m benchmarks.speed --output speed.json            the tables of docs/performance.md
    python -m benchmarks.speed --profile              where the time of one of our steps goes
    python -m benchmarks.speed --loss_curve 50 --layers 2 --width 64 --learning_rate 1e-4
    python -m benchmarks.speed --gpu --family llama ...     see benchmarks/gpu/README.md

Every number is measured in a process of its own, and the systems take turns: ours, textbook, trl, ours, ...
All train the same pairs in the same optimizer steps from the same weights, with AdamW and without dropout, in
float32 on the CPU; with --gpu in bfloat16 with float32 masters on one GPU, TRL with Liger's kernels. This
module only starts processes and compares: it imports neither torch nor dpo's model.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from dpo.errors import UserError

ROOT = Path(__file__).parents[1]
PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
SHARED = ROOT.parent / "shared"
WORKS = ("hh", "best4")
TASKS = ("precompute", "train")
SYSTEMS = ("ours", "textbook", "trl")
FAMILIES = ("gpt2", "llama")
PAIRS_PER_PROMPT = {"hh": 1, "best4": 3}
LOSS_TOLERANCE = 1e-4
"""Largest relative difference of two loss curves that counts as the same curve."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured; every process reads it from settings.json."""

    folder: str
    """The work folder: model, pairs, and what the systems write while they are measured."""
    hh: str
    """Anthropic's HH-RLHF, .jsonl or .jsonl.gz."""
    books: str
    """Text, a paragraph a line, .txt or .txt.xz."""
    tokenizer: str
    layers: int
    width: int
    steps: int
    """Optimizer steps of a run, the first included, which is not timed."""
    pairs_per_step: int
    pairs_per_micro_batch: int
    """Of the textbook path and of TRL."""
    max_tokens_per_micro_batch: int
    """Of this system, in training and in precompute."""
    learning_rate: float
    beta: float
    max_length: int
    """Longest prompt + completion, in tokens."""
    threads: int
    seed: int
    family: str = "gpt2"
    """Architecture of the model: one of FAMILIES."""
    gpu: bool = False
    """One GPU instead of the CPU; TRL then takes Liger's kernels."""
    dtype: str = "float32"
    """bfloat16: this system with float32 masters, TRL with autocast over float32 weights."""
    peers_python: str = str(PEERS_PYTHON)
    """Interpreter that has TRL."""

    @classmethod
    def read(cls, path: str) -> "Settings":
        """Reads settings.json."""
        return cls(**json.loads(Path(path).read_text()))

    def work(self, name: str) -> Path:
        """The folder of a work."""
        return Path(self.folder) / name

    @property
    def model(self) -> str:
        """The folder of the model that all systems start from."""
        return str(Path(self.folder) / "model")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one process measured."""

    system: str
    work: str
    task: str
    pairs: int
    """Pairs in `seconds`."""
    seconds: float
    """Time of the steps after the first one, or of the forward passes of precompute; without loading."""
    tokens: int
    """Tokens that went through the layers in `seconds`, without padding."""
    peak_bytes: int
    """Most resident memory since the process began, over its ranks; on a GPU, most allocated there."""
    losses: list[float]
    """Of every optimizer step, the first included; empty for precompute."""

    def print(self) -> None:
        """The line that the parent process reads."""
        print(json.dumps(asdict(self)), flush=True)


class Job(NamedTuple):
    """A process to start, and what it will measure."""

    system: str
    work: str
    tasks: list[str]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmarks.speed", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS), help="pairs, or best of 4")
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, help="default: all that can run there")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each system; the median counts")
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps of a run, after one more")
    parser.add_argument("--pairs_per_step", type=int, default=24)
    parser.add_argument("--pairs_per_micro_batch", type=int, default=4, help="of textbook and trl")
    parser.add_argument("--max_tokens_per_micro_batch", type=int, default=1024, help="of this system")
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--max_length", type=int, default=512, help="tokens of prompt + completion")
    parser.add_argument("--family", choices=FAMILIES, default="gpt2")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="d_model; heads are 64 wide")
    parser.add_argument("--gpu", action="store_true", help="on one GPU; the textbook path cannot")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32"
    )
    parser.add_argument(
        "--peers_python", type=Path, default=PEERS_PYTHON, metavar="FILE", help="interpreter that has TRL"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="cores of each system")
    parser.add_argument("--seed", type=int, default=0, help="of weights, subset, scores and order")
    parser.add_argument(
        "--hh", default=str(SHARED / "data" / "hh-harmless" / "test.jsonl.gz"), metavar="FILE"
    )
    parser.add_argument("--books", default=str(SHARED / "data" / "books" / "train.txt.xz"), metavar="FILE")
    parser.add_argument("--tokenizer", default=str(SHARED / "tokenizers" / "gpt2"), metavar="FOLDER_OR_NAME")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write every measurement here, as JSON")
    parser.add_argument("--work_dir", type=Path, metavar="DIR", help="keep model and data here")
    parser.add_argument(
        "--loss_curve", type=int, metavar="N", help="instead: compare our loss curve with the textbook's"
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="instead: what the last optimizer step of ours spends its time on",
    )
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if args.gpu else "float32")
    args.systems = args.systems or [name for name in SYSTEMS if not (args.gpu and name == "textbook")]
    args.systems.sort(key=SYSTEMS.index)
    args.task.sort(key=TASKS.index)
    return args


def check(args: argparse.Namespace) -> None:
    """Raises UserError for what is known to be wrong before anything is measured."""
    for name in ("rounds", "steps", "pairs_per_step", "pairs_per_micro_batch", "layers", "threads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}: {getattr(args, name)}; expected at least 1")
    if args.width < 64 or args.width % 64:
        raise UserError(f"--width: {args.width}; expected a multiple of 64, the width of a head")
    if args.gpu and "textbook" in args.systems:
        raise UserError("--systems: textbook is written for CPUs; expected ours and trl with --gpu")
    if args.dtype != "float32" and "textbook" in args.systems:
        raise UserError(
            f"--dtype: {args.dtype}; the textbook path computes in float32, choose --systems ours trl"
        )
    whole = [args.pairs_per_micro_batch, *(PAIRS_PER_PROMPT[work] for work in args.work)]
    if wrong := [number for number in whole if args.pairs_per_step % number]:
        raise UserError(
            f"--pairs_per_step: {args.pairs_per_step}; expected a multiple of {wrong[0]}, so that every "
            "system has the same pairs in a step"
        )
    for option, path, needed in (
        ("--hh", args.hh, "hh" in args.work),
        ("--books", args.books, "best4" in args.work),
        ("--tokenizer", args.tokenizer, args.tokenizer.startswith((".", "/"))),
    ):
        if needed and not Path(path).exists():
            raise UserError(f"{option}: {path} does not exist; give {option}, or leave its --work out")
    if (
        args.loss_curve is None
        and not args.profile
        and "trl" in args.systems
        and not args.peers_python.exists()
    ):
        raise UserError(
            f"--peers_python: {args.peers_python} does not exist; run make bench-peers, or leave trl out "
            "of --systems"
        )


def settings_of(args: argparse.Namespace, folder: Path) -> Settings:
    """Writes settings.json into the work folder."""
    values = {name: value for name, value in vars(args).items() if name in Settings.__dataclass_fields__}
    for name in ("hh", "books", "tokenizer"):
        values[name] = str(Path(values[name]).resolve()) if Path(values[name]).exists() else values[name]
    values["steps"] = args.loss_curve or args.steps + 1
    values["peers_python"] = str(args.peers_python)
    settings = Settings(folder=str(folder.resolve()), **values)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(asdict(settings), indent=2))
    return settings


def child(settings: Settings, command: Sequence[str], **variables: str) -> list[dict[str, Any]]:
    """Runs a process to its end and returns the JSON objects that it printed, a line each.

    Raises:
        RuntimeError: It failed; with the end of what it said.
        UserError: It ended with status 2; with what it said.
    """
    threads = {name: str(settings.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    device = {} if settings.gpu else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    quiet = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env = {**os.environ, **threads, **device, **quiet, **variables}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise UserError(done.stderr.strip() or done.stdout.strip())
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]


def worker(settings: Settings, action: str, *more: str) -> list[dict[str, Any]]:
    """Runs an action of benchmarks.speed_work in one process."""
    path = f"{settings.folder}/settings.json"
    return child(settings, [sys.executable, "-m", "benchmarks.speed_work", action, path, *more])


def measure(settings: Settings, job: Job) -> list[Measurement]:
    """Measures one system on one work."""
    path = f"{settings.folder}/settings.json"
    found: list[dict[str, Any]] = []
    if job.system == "trl":  # its constructor precomputes, so one process has both numbers
        script = str(ROOT / "benchmarks" / "peers" / "trl_dpo.py")
        found = child(settings, [settings.peers_python, script, path, job.work, *job.tasks])
    for task in job.tasks if job.system == "textbook" else []:
        found += child(settings, [sys.executable, "-m", "benchmarks.textbook", path, job.work, task])
    if job.system == "ours":
        # Precompute has one thread a rank, so that its values do not depend on the number of ranks.
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu.yaml"]
        ranks = ["--num_processes", str(settings.threads), "--main_process_port", "0"]
        module = ["-m", "benchmarks.speed_work", "precompute", path, job.work]
        if "precompute" in job.tasks or not (settings.work(job.work) / "reference").exists():
            alone = [sys.executable, *module]
            found = child(
                settings, alone if settings.gpu else [*launch, *ranks, *module], OMP_NUM_THREADS="1"
            )
        if "train" in job.tasks:
            found += worker(settings, "train", job.work)
    return [Measurement(**one) for one in found if one["task"] in job.tasks]


def compare(args: argparse.Namespace, settings: Settings) -> None:
    """Measures everything in turns, and prints the tables."""
    _say(f"preparing {' and '.join(args.work)} in {settings.folder}")
    facts = {work: worker(settings, "prepare", work)[0] for work in args.work}
    measured: list[Measurement] = []
    peaks: list[float] = []
    for turn in range(args.rounds):
        peaks.append(worker(settings, "peak")[0]["flops_per_second"])
        _say(f"round {turn + 1} of {args.rounds}: matrix products at {peaks[-1] / 1e9:.0f} GFLOP/s")
        for work in args.work:
            for system in args.systems:
                for one in measure(settings, Job(system, work, args.task)):
                    measured.append(one)
                    _say(
                        f"{work:5} {one.task:10} {system:8} {one.pairs / one.seconds:7.3f} pairs/s "
                        f"{one.peak_bytes / 2**30:5.2f} GiB"
                    )
        if args.output:
            write(args.output, settings, facts, peaks, measured)
    print("\n".join(tables(measured, facts, max(peaks))))


def write(
    path: Path,
    settings: Settings,
    facts: Mapping[str, Any],
    peaks: Sequence[float],
    measured: Sequence[Measurement],
) -> None:
    """Writes everything that was measured so far."""
    paths = ("folder", "hh", "books", "tokenizer", "peers_python")
    content = {
        "settings": {name: value for name, value in asdict(settings).items() if name not in paths},
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "processor": platform.processor() or platform.machine(),
        "peak_flops_per_second": peaks,
        "work": facts,
        "measurements": [asdict(one) for one in measured],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


def tables(measured: Sequence[Measurement], facts: Mapping[str, Any], peak: float) -> list[str]:
    """Two Markdown tables: every system by itself, and ours against the others.

    Args:
        measured: Of all rounds.
        facts: Useful floating-point operations of each work and task.
        peak: Of the matrix product, in FLOP/s.
    """
    turns: dict[tuple[str, str, str], list[Measurement]] = {}
    for one in measured:
        turns.setdefault((one.work, one.task, one.system), []).append(one)
    rates = {key: statistics.median(one.pairs / one.seconds for one in own) for key, own in turns.items()}
    memory = {key: statistics.median(one.peak_bytes for one in own) for key, own in turns.items()}
    lines = [
        f"Matrix product: {peak / 1e9:.0f} GFLOP/s.\n",
        "| work | task | system | pairs/s (of all rounds) | tokens/pair | useful GFLOP/s | of the product "
        "| peak memory, GiB |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for key, own in turns.items():
        work, task, system = key
        flops = facts[work]["useful_flops"][task] / own[0].pairs * rates[key]
        each = sorted(one.pairs / one.seconds for one in own)
        lines.append(
            f"| {work} | {task} | {system} | {rates[key]:.3f} ({each[0]:.3f} to {each[-1]:.3f}) "
            f"| {own[0].tokens / own[0].pairs:.1f} | {flops / 1e9:.1f} | {flops / peak:.2f} "
            f"| {memory[key] / 2**30:.2f} |"
        )
    lines += ["", "| work | task | against | pairs/s | peak memory | largest difference of the losses |"]
    lines += ["|---|---|---|---:|---:|---:|"]
    for work, task, system in turns:
        ours, theirs = (work, task, "ours"), (work, task, system)
        if system != "ours" and ours in turns:
            gap = largest_difference(turns[ours][0].losses, turns[theirs][0].losses)
            lines.append(
                f"| {work} | {task} | {system} | {rates[ours] / rates[theirs]:.2f} x "
                f"| {memory[ours] / memory[theirs]:.2f} x | {f'{gap:.1e}' if task == 'train' else ''} |"
            )
    return lines


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest |ours - theirs| / |theirs| over the steps; 0 without steps."""
    return max((abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def loss_curve(args: argparse.Namespace, settings: Settings) -> bool:
    """Trains both paths on the same pairs in the same order; whether their losses agree."""
    agree = True
    for work in args.work:
        worker(settings, "prepare", work)
        ours, theirs = (
            measure(settings, Job(system, work, ["train"]))[0].losses for system in ("ours", "textbook")
        )
        gap = largest_difference(ours, theirs)
        agree &= gap <= LOSS_TOLERANCE
        print(
            f"{work}: {len(ours)} steps, loss {ours[0]:.6f} -> {ours[-1]:.6f} (textbook {theirs[-1]:.6f}); "
            f"largest relative difference {gap:.2g}, {'within' if gap <= LOSS_TOLERANCE else 'ABOVE'} "
            f"{LOSS_TOLERANCE:g}",
            flush=True,
        )
    return agree


def profile(args: argparse.Namespace, settings: Settings) -> None:
    """Prints where the time of one optimizer step goes, for each work."""
    for work in args.work:
        worker(settings, "prepare", work)
        measure(settings, Job("ours", work, ["precompute"]))
        (found,) = worker(settings, "profile", work)
        total = sum(found["seconds"].values())
        print(f"\n| {work}, {settings.pairs_per_step} pairs, {total:.1f} s | share |\n|---|---:|")
        for kind, seconds in found["seconds"].items():
            print(f"| {kind} | {seconds / total:.1%} |", flush=True)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> int:
    """0 done, 1 the loss curves differ, 2 bad usage or data."""
    args = arguments()
    try:
        check(args)
        kept = nullcontext(args.work_dir) if args.work_dir else tempfile.TemporaryDirectory()
        with kept as folder:
            settings = settings_of(args, Path(folder))
            if args.loss_curve is not None:
                return 0 if loss_curve(args, settings) else 1
            if args.profile:
                profile(args, settings)
                return 0
            compare(args, settings)
    except UserError as error:
        _say(f"speed: error: {error}")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
