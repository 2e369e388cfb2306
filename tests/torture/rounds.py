"""kill -9 of everything at random moments of a two-round run on 2 ranks, and then the same command once more.

    python -m torture.rounds --folder FOLDER                 10 kills; status 1 if the end is another one
    python -m torture.rounds --folder FOLDER --kills 3 --seed 7

`dpo rounds` and the ranks of its stages are forked from this process, which has imported everything, so that
a run takes a minute. The folder keeps an undisturbed run, with which later calls compare. What must hold:
data, weights, metrics, samples and tables of all rounds have the same bytes as those of the undisturbed run.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import yaml
from ranks import free_port, rank_environment
from rig import NOT_TIMING, deepspeed_variables
from tiny import make_tiny_model

from dpo.errors import RunFailed, UserError
from dpo.files import WRITING

RANKS = 2
SAMPLING = "--num_samples 3 --completion_tokens 6 --temperature 1"
LENGTHS = "def of(prompts, completions):\n    return [*map(len, completions)]\n"
COMPARED = (
    "rounds.json",
    "rounds.md",
    "round_*/data/*",
    "round_*/run/model/*",
    "round_*/run/metrics.jsonl",
    "round_*/run/report/*.json*",
)
NOT_COMPARED = ("provenance.json",)
"""Has the time of the run."""
PRELOADED = (
    *(f"dpo.commands.{name}" for name in ("rounds", "train", "evaluate", "precompute_ref", "check")),
    *("data_prep.cli", "data_prep.sample", "dpo.evaluate.scoring", "deepspeed", "pyarrow.parquet"),
    *("transformers.models.gpt2.modeling_gpt2", "torch.utils.tensorboard", "matplotlib.figure"),
)


def prepare(folder: Path) -> None:
    """A tiny model, prompts and a configuration; a run is the folder's `rounds`."""
    from data_prep.cli import main as data_prep

    folder.mkdir(parents=True)
    make_tiny_model(folder / "model")
    rows = [{"prompt": f"{n} the cat", "chosen": " sat down", "rejected": " left"} for n in range(60)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "lengths.py").write_text(LENGTHS)
    assert data_prep(["preferences", str(folder / "pairs.jsonl"), "--output", str(folder / "prompts")]) == 0
    config = {
        "run_dir": "run",
        "model": {"name_or_path": "model", "dtype": "float32"},
        "data": {"train": "prompts"},
        "evaluate": {"scorer": "python:lengths.of", "num_prompts": 4, "completion_tokens": 6},
        "train": {"pairs_per_step": 4, "learning_rate": 1e-3, "checkpoint_every": 2, "evaluate_every": 3},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def in_a_fork(work: Callable[[], int | None], log: Path | None = None) -> int:
    """Starts `work` in a copy of this process; returns its number."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        if log is not None:
            os.setsid()  # a group, which a kill reaches as a whole
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        status = int(work() or 0)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(status)


def status_of(pid: int) -> int:
    """Waits for a process; its exit status, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def stage(name: str, command: Sequence[str]) -> None:
    """A stage of `dpo rounds` on forked ranks, in place of `journal.start`."""
    print(f"\n== {' '.join(command)}", flush=True)
    module, *words = command[1:]
    port, variables = free_port(), deepspeed_variables(Path.cwd(), 2)

    def rank(number: int) -> int:
        os.environ |= rank_environment(number, RANKS, port) | variables
        from data_prep.cli import main as data_prep
        from dpo.cli.main import run

        return run(words) if module == "dpo" else data_prep(words)

    statuses = [status_of(pid) for pid in [in_a_fork(lambda n=n: rank(n)) for n in range(RANKS)]]  # type: ignore[misc]
    if 2 in statuses:
        raise UserError(f"{name} exited with status 2")
    if any(statuses):
        raise RunFailed(f"{name} exited with {statuses}")


def start(folder: Path) -> int:
    """`dpo rounds` in a group of processes of its own; the same command each time."""

    def work() -> int:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        from dpo.cli.main import run

        words = ["rounds", "--config", "config.yaml", "--rounds", "2", "--patience", "0"]
        words += ["--sample", SAMPLING, "--output", "rounds", "--launcher", "forked"]
        with patch("dpo.commands.journal.start", stage), patch("dpo.commands.rounds.start", stage):
            return run(words)

    return in_a_fork(work, folder / "log")


def finish(folder: Path) -> float:
    """Runs the command to its end; returns seconds."""
    began = time.monotonic()
    if status := status_of(start(folder)):
        raise SystemExit(f"status {status}: see {folder / 'log'}")
    return time.monotonic() - began


def stage_of(folder: Path) -> str:
    """The stage that the log says was started last."""
    lines = [line for line in (folder / "log").read_text(errors="replace").splitlines() if line[:3] == "== "]
    if not lines:
        return "before the first stage"
    names = ("sample", "precompute-ref", "train", "evaluate")
    name = next(name for name in names if name in lines[-1].split())
    return f"{name} of round {2 if 'rounds/round_2' in lines[-1] else 1}"


def result(folder: Path) -> dict[str, str]:
    """Name -> digest of all that a finished run leaves, without what depends on timing."""
    found = {}
    for pattern in COMPARED:
        for file in sorted((folder / "rounds").glob(pattern)):
            if file.is_file() and file.name not in NOT_COMPARED and not file.name.endswith(WRITING):
                content = file.read_bytes()
                if file.name == "metrics.jsonl":
                    content = without_timing(content)
                found[str(file.relative_to(folder / "rounds"))] = hashlib.sha256(content).hexdigest()
    return found


def without_timing(content: bytes) -> bytes:
    """The lines of a metrics.jsonl without what depends on the speed of the machine."""
    lines = [json.loads(line) for line in content.splitlines()]
    kept = [{key: value for key, value in line.items() if not key.startswith(NOT_TIMING)} for line in lines]
    return json.dumps(kept).encode()


def undisturbed(folder: Path) -> tuple[dict[str, str], float]:
    """What a run leaves that nothing disturbs, and its seconds; made once a folder."""
    file = folder / "undisturbed.json"
    if not file.is_file():
        shutil.rmtree(folder / "undisturbed", ignore_errors=True)
        assert status_of(in_a_fork(lambda: prepare(folder / "undisturbed"))) == 0
        seconds = finish(folder / "undisturbed")
        file.write_text(json.dumps([result(folder / "undisturbed"), seconds]))
    expected, seconds = json.loads(file.read_text())
    return expected, seconds


def killed(folder: Path, kills: int, moments: random.Random, seconds: float) -> int:
    """A run that is killed again and again, and then finishes; prints when and where it was killed.

    Args:
        folder: Where to run.
        kills: How often everything is killed, at most: the run may finish before.
        moments: Draws them.
        seconds: Of an undisturbed run; a kill comes at most half of it after a start.

    Returns:
        How often it was killed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    assert status_of(in_a_fork(lambda: prepare(folder))) == 0
    for done in range(kills):
        after, pid = moments.uniform(0.0, seconds / 2), start(folder)
        until = time.monotonic() + after
        while time.monotonic() < until:
            if os.waitpid(pid, os.WNOHANG) != (0, 0):
                finish(folder)  # nothing is left to do, if it ended well
                return done
            time.sleep(0.01)
        os.killpg(pid, signal.SIGKILL)
        status_of(pid)
        print(f"{folder.name}: killed {after:.1f} s after a start, in {stage_of(folder)}", flush=True)
    finish(folder)
    return kills


def different(folder: Path, expected: dict[str, str]) -> list[str]:
    """Files of a run that are not those of the undisturbed one, or that a killed process left."""
    found = result(folder)
    found |= {str(path): "left" for path in (folder / "rounds").rglob(f".*{WRITING}")}
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))


def preload() -> None:
    """Imports what the stages import, before this process is copied."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for module in PRELOADED:
        __import__(module)
    import torch

    torch.set_num_threads(1)


def main() -> int:
    """Prints each kill and whether the end is the same."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    preload()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    expected, seconds = undisturbed(folder)
    print(f"undisturbed: {seconds:.0f} s, {len(expected)} files", flush=True)
    moments, done, wrong, runs = random.Random(args.seed), 0, list[str](), 0
    while done < args.kills:  # a run that finishes before is followed by another
        runs += 1
        run = folder / f"killed_{args.seed}_{runs}"
        done += killed(run, args.kills - done, moments, seconds)
        wrong += [f"{run.name}: {name}" for name in different(run, expected)]
    print(f"{done} kills of {runs} run(s); {f'other files: {wrong}' if wrong else 'the same end'}")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
