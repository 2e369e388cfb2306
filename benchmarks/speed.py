"""Throughput and peak memory of this system, of the textbook path, and of TRL's DPOTrainer, on the same work.

    python -m benchmarks.speed --output speed.json            the tables of docs/performance.md
    python -m benchmarks.speed --profile              where the time of one of our steps goes
    python -m benchmarks.speed --loss_curve 50 --layers 2 --width 64 --learning_rate 1e-4
    python -m benchmarks.speed --gpu --family llama ...     see benchmarks/gpu/README.md

Every number is measured in a process of its own, and the systems take turns: ours, textbook, trl, ours, ...
All train the same pairs in the same optimizer steps from the same weights, with AdamW and without dropout, in
float32 on the CPU; with --gpu in bfloat16 with float32 masters on one GPU, TRL with Liger's kernels.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.speed_processes import (
    FAMILIES,
    PAIRS_PER_PROMPT,
    PEERS_PYTHON,
    SHARED,
    SYSTEMS,
    TASKS,
    WORKS,
    Job,
    Measurement,
    Settings,
    measure,
    worker,
)
from benchmarks.speed_tables import largest_difference, tables
from dpo.errors import UserError

LOSS_TOLERANCE = 1e-4
"""Largest relative difference of two loss curves that counts as the same curve."""


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
