"""Tokenizing at scale: rows a second, memory, and what a killed build redoes; docs/data.md.

    python -m benchmarks.tokenize_scale --tokenizer gpt2 [--rows 400000] [--sizes 10000 100000 1000000]

Pairs of about 1 KB, made here. The measure to beat is `datasets.map(num_proc=2)`, in batches, with the same
tokenizer and the same three texts a pair (prompt, prompt + chosen, prompt + rejected). Every measurement is a
fresh process; Linux only.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.cache_scale import hardware
from dpo.config import DataConfig

WORDS = 60
"""Of a prompt and of each completion."""
KILL_AFTER = 0.5
"""Share of the parts that are written when the build is killed."""
HEADER = " | seconds | rows/s | peak memory of all processes |\n|---|---|---|---|"
ROOT = Path(__file__).parents[1]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables and draws the figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True, help="a folder or a hub name")
    parser.add_argument("--rows", type=int, default=400_000, help="rows of the comparison")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--figure", type=Path, help="where to draw rows against seconds (PNG)")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # what a fresh process is started with
    options = parser.parse_args(arguments)
    if options.measure:
        way, file, cache = options.measure
        print(json.dumps(measure(way, file, Path(cache), options.tokenizer)))
        return
    print(hardware(), end="\n\n")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compare(folder, options.tokenizer, options.rows)
        killed(folder, options.tokenizer, options.rows // 8)
        sizes(folder, options.tokenizer, options.sizes, options.figure)


def compare(folder: Path, tokenizer: str, rows: int) -> None:
    """One and two processes, `datasets`, and a second start."""
    file = written(folder, rows)
    print(f"\n| {rows:,} pairs, {file.stat().st_size / 1e6:,.0f} MB{HEADER}")
    digests = set()
    for way in ("2", "datasets", "1"):
        found = fresh(way, file, folder / f"cache_{way}", tokenizer)
        names = {"datasets": "`datasets.map(num_proc=2)`"}
        show(names.get(way, f"data.num_workers {way}"), rows, found)
        digests |= {found["digest"]} - {""}
    assert len(digests) == 1
    show("second start, all there", rows, fresh("2", file, folder / "cache_2", tokenizer))
    for way in ("1", "2", "datasets"):
        shutil.rmtree(folder / f"cache_{way}")


def killed(folder: Path, tokenizer: str, rows: int) -> None:
    """Kills a build with -9 when half of its parts are there, and runs it again."""
    file, cache = written(folder, rows), folder / "killed"
    undisturbed = fresh("2", file, folder / "undisturbed", tokenizer)
    with subprocess.Popen(command("2", file, cache, tokenizer), cwd=ROOT, start_new_session=True) as build:
        total = -(-rows // 4096)
        while len(done := parts_of(cache)) < KILL_AFTER * total:
            time.sleep(0.02)
        os.killpg(build.pid, signal.SIGKILL)
    time.sleep(1)
    before = {part: part.stat().st_ino for part in parts_of(cache)}
    again = fresh("2", file, cache, tokenizer)
    assert again["digest"] == undisturbed["digest"]
    redone = total - len(before)
    print(
        f"\nkill -9 with {len(done)} of {total} parts there: the same command tokenized {redone} parts in "
        f"{again['seconds']:.1f} s (undisturbed: {total} in {undisturbed['seconds']:.1f} s); the same digest"
    )


def sizes(folder: Path, tokenizer: str, rows: Sequence[int], figure: Path | None) -> None:
    """Rows against seconds and memory."""
    print(f"\n| rows{HEADER}")
    found = []
    for number in rows:
        file = written(folder, number)
        found.append(fresh("2", file, folder / f"size_{number}", tokenizer))
        show(f"{number:,}", number, found[-1])
        if number == max(rows):
            show(f"{number:,}, second start", number, fresh("2", file, folder / f"size_{number}", tokenizer))
        file.unlink()
    if figure is not None:
        fig, axis = plt.subplots(figsize=(5, 3.5), layout="constrained")
        axis.loglog(rows, [one["seconds"] for one in found], marker="o")
        axis.set(xlabel="pairs of 1 KB", ylabel="seconds to tokenize, 2 processes")
        axis.grid(alpha=0.3, which="both")
        fig.savefig(figure, dpi=120)


def show(name: str, rows: int, found: dict[str, Any]) -> None:
    """A line of a table."""
    rate = rows / found["seconds"]
    print(f"| {name} | {found['seconds']:.1f} | {rate:,.0f} | {found['peak'] / 2**20:,.0f} MiB |", flush=True)


def written(folder: Path, rows: int) -> Path:
    """A file of pairs of random words, about 1 KB each."""
    file = folder / f"{rows}.jsonl"
    if not file.exists():
        draw = random.Random(0)
        pages = [ROOT / "docs" / "how-it-works.md", ROOT / "README.md"]
        text = [word for page in pages for word in page.read_text().split()]

        def words() -> str:
            start = draw.randrange(len(text) - WORDS)
            return " ".join(text[start : start + WORDS])

        with file.open("w") as lines:
            for number in range(rows):
                row = {"prompt": f"{number} {words()}", "chosen": f" {words()}", "rejected": f" {words()}"}
                lines.write(json.dumps(row) + "\n")
    return file


def parts_of(cache: Path) -> list[Path]:
    """The finished parts of a build."""
    return [part for part in cache.glob("*.parts/[0-9]*") if (part / "counts.json").is_file()]


def command(way: str, file: Path, cache: Path, tokenizer: str) -> list[str]:
    """What measures one way in a process of its own."""
    module = [sys.executable, "-m", "benchmarks.tokenize_scale", "--tokenizer", tokenizer]
    return [*module, "--measure", way, str(file), str(cache)]


def fresh(way: str, file: Path, cache: Path, tokenizer: str) -> dict[str, Any]:
    """`measure` in a process of its own."""
    alone = {"TOKENIZERS_PARALLELISM": "false"} if way == "1" else {}  # one thread
    done = subprocess.run(
        command(way, file, cache, tokenizer),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        env=os.environ | alone,
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(way: str, file: str, cache: Path, tokenizer: str) -> dict[str, Any]:
    """Seconds, peak bytes and content digest of tokenizing a file in one way."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    peak = Peak()
    started = time.perf_counter()
    digest = ""
    if way == "datasets":
        with_datasets(file, cache, loaded)
    else:
        from dpo.data.build import open_datasets

        data = DataConfig(train=file, cache_dir=str(cache), num_workers=int(way))
        digest = open_datasets(data, loaded, 1024)[0].content_digest()
    return {"seconds": time.perf_counter() - started, "peak": peak.stop(), "digest": digest}


def with_datasets(file: str, cache: Path, tokenizer: Any) -> None:
    """Three lists of ids a row, as others tokenize pairs."""
    import datasets

    def encoded(batch: dict[str, list[str]]) -> dict[str, Any]:
        prompts = batch["prompt"]
        texts = {"prompt": prompts} | {
            side: [prompt + completion for prompt, completion in zip(prompts, batch[side], strict=True)]
            for side in ("chosen", "rejected")
        }
        return {f"{side}_ids": tokenizer(several).input_ids for side, several in texts.items()}

    datasets.disable_progress_bars()
    rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(cache))
    rows.map(encoded, batched=True, num_proc=2, remove_columns=rows.column_names)


class Peak:
    """The largest memory of this process and its descendants together, looked at ten times a second."""

    def __init__(self) -> None:
        self._peak, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._ended.wait(0.1):
            self._peak = max(self._peak, sum(map(_proportional, [os.getpid(), *_descendants(os.getpid())])))

    def stop(self) -> int:
        """The peak in bytes."""
        self._ended.set()
        self._thread.join()
        return self._peak


def _descendants(pid: int) -> list[int]:
    try:
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return []
    return children + [one for child in children for one in _descendants(child)]


def _proportional(pid: int) -> int:
    """Memory of a process that no file backs; shared pages count in parts."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss_Anon:"))


if __name__ == "__main__":
    main()
