"""Faults of a reference cache, tried with the real commands.

    python -m benchmarks.cache_faults            prints the table of docs/reference-cache.md

Each fault starts from a complete cache of a tiny model, breaks one thing, runs a command, and checks the exit
status, the message, and that no finished row was lost. tests/end_to_end/test_cache_faults.py runs the same
list.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import GPT2LMHeadModel

from benchmarks.cache_bench import Bench, Ended, make_bench, must_succeed, write_pairs
from dpo.reference.store import ReferenceStore


class Skip(Exception):  # noqa: N818  (not an error)
    """This machine cannot try a fault; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault, and what must happen."""

    name: str
    happens: Callable[[Bench], Ended]
    """Breaks one thing and runs a command."""
    status: int
    message: str
    """Part of what the command prints."""
    outcome: str
    """What happens, for the table."""


def _flipped_byte(bench: Bench) -> Ended:
    path = bench.store.shards()[0]
    content = bytearray(path.read_bytes())
    content[pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset + 100] ^= 4
    path.write_bytes(content)
    return bench.dpo("train")


def _truncated(bench: Bench) -> Ended:
    path = bench.store.shards()[0]
    path.write_bytes(path.read_bytes()[:-100])
    return bench.dpo("train")


def _deleted(bench: Bench) -> Ended:
    bench.store.shards()[0].unlink()
    return bench.dpo("train")


def _deleted_then_rebuilt(bench: Bench) -> Ended:
    bench.store.shards()[0].unlink()
    must_succeed(bench.dpo("precompute-ref"))
    return bench.dpo("train")


def _folder_of_another_model(bench: Bench) -> Ended:
    ours = bench.store.path
    _flip_a_weight(bench.model)
    must_succeed(bench.dpo("precompute-ref"))
    (theirs,) = (file.parent for file in ours.parent.glob("*/identity.json") if file.parent != ours)
    _flip_a_weight(bench.model)  # back again
    shutil.rmtree(ours)
    shutil.copytree(theirs, ours)
    return bench.dpo("train")


def _shard_of_another_model(bench: Bench) -> Ended:
    bench.rewrite(-1.0, identity="ab" * 32)
    return bench.dpo("train")


def _edited_identity(bench: Bench) -> Ended:
    file = bench.store.path / "identity.json"
    file.write_text(file.read_text().replace('"float32"', '"bfloat16"'))
    return bench.dpo("train")


def _shifted_values(bench: Bench) -> Ended:
    bench.rewrite(-0.01)
    return bench.dpo("train", "--reference.audit_rows", "4")


def _flip_a_weight(model: Path) -> None:
    """Flips a bit of the last weight; the file keeps its name, size and modification time."""
    path = model / "model.safetensors"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _edited_weights(bench: Bench) -> Ended:
    _flip_a_weight(bench.model)
    return bench.dpo("train")


def _other_tokenizer(bench: Bench) -> Ended:
    file = bench.model / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    return bench.dpo("train")


def _other_max_length(bench: Bench) -> Ended:
    return bench.dpo("train", "--data.max_length", "24")


def _other_template(bench: Bench) -> Ended:
    rows = [json.loads(line) for line in bench.pairs.read_text().splitlines()]
    for row in rows:
        row["prompt"] = [{"role": "user", "content": row["prompt"]}]
        for side in ("chosen", "rejected"):
            row[side] = [{"role": "assistant", "content": row[side]}]
    bench.pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = "{% for m in messages %}X{{ m['content'] }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}X{% endif %}"
    file = bench.model / "chat_template.jinja"
    file.write_text(template)
    must_succeed(bench.dpo("precompute-ref"))
    must_succeed(bench.dpo("train", "--run_dir", str(bench.folder / "before")))
    file.write_text(template.replace("X", "Y"))
    return bench.dpo("train")


def _other_dtype(bench: Bench) -> Ended:
    return bench.dpo("train", "--model.dtype", "bfloat16")


def _nan_in_a_shard(bench: Bench) -> Ended:
    bench.rewrite(np.nan, only_first=True)
    return bench.dpo("train")


def _nan_in_the_weights(bench: Bench) -> Ended:
    model = GPT2LMHeadModel.from_pretrained(bench.model)
    with torch.no_grad():
        model.transformer.ln_f.bias[0] = torch.nan
    model.save_pretrained(bench.model)
    ours = bench.store.path
    ended = bench.dpo("precompute-ref")
    assert {path.parent for path in ours.parent.glob("*/part-*.parquet")} == {ours}, "a NaN was stored"
    return ended


@contextlib.contextmanager
def _small_disk(bench: Bench, size: str) -> Iterator[Path]:
    place = bench.folder / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        raise Skip(f"no permission to mount a small disk ({mounted.stderr.strip()})")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


def _remount(place: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(place)], check=True)


def _disk_full(bench: Bench) -> Ended:
    write_pairs(bench.pairs, 400)
    with _small_disk(bench, "64k") as place:
        writing = ("--reference.cache_dir", str(place), "--reference.flush_every_seconds", "0")
        ended = bench.dpo("precompute-ref", *writing)
        (identity,) = place.glob("*/identity.json")
        finished = len(ReferenceStore.at(identity.parent).load())
        assert finished > 0, "the rows that were written before the disk was full are lost"
        _remount(place, "size=16m")
        assert f"{finished} sequences were cached" in must_succeed(bench.dpo("precompute-ref", *writing))
    return ended


def _read_only(bench: Bench) -> Ended:
    with _small_disk(bench, "1m") as place:
        _remount(place, "ro")
        return bench.dpo("precompute-ref", "--reference.cache_dir", str(place))


def _read_only_and_full(bench: Bench) -> Ended:
    with _small_disk(bench, "1m") as place:
        shutil.copytree(bench.folder / "reference", place, dirs_exist_ok=True)
        _remount(place, "ro")
        return bench.dpo("train", "--reference.cache_dir", str(place))


def _changed_before_resume(bench: Bench) -> Ended:
    must_succeed(bench.dpo("train", "--train.checkpoint_every", "1"))
    bench.rewrite(-1e-6)
    return bench.dpo("train", "--train.checkpoint_every", "1")


def _deleted_before_resume(bench: Bench) -> Ended:
    must_succeed(bench.dpo("train", "--train.checkpoint_every", "1"))
    shutil.rmtree(bench.folder / "reference")
    return bench.dpo("train", "--train.checkpoint_every", "1")


FAULTS = [
    Fault(name="flipped byte in a shard", happens=_flipped_byte, status=2, message="damaged shard",
          outcome="train refuses and names the file"),
    Fault(name="truncated shard", happens=_truncated, status=2, message="damaged shard",
          outcome="train refuses and names the file"),
    Fault(name="deleted shard", happens=_deleted, status=2, message="the cache lacks",
          outcome="train refuses, counts the missing rows, names the command"),
    Fault(name="deleted shard, then precompute-ref", happens=_deleted_then_rebuilt, status=0,
          message="audit:", outcome="the missing rows are computed, and the audit passes"),
    Fault(name="another model's folder under our name", happens=_folder_of_another_model, status=2,
          message="another reference model: weights.model", outcome="train refuses and says what differs"),
    Fault(name="another model's shard in our folder", happens=_shard_of_another_model, status=2,
          message="a shard of another reference model", outcome="train refuses, with both identities"),
    Fault(name="identity.json edited", happens=_edited_identity, status=2,
          message="does not match its content", outcome="train refuses"),
    Fault(name="values off by 0.01 nats, checksums right", happens=_shifted_values, status=2,
          message="audit failed", outcome="the audit stops training before the first step, with the numbers"),
    Fault(name="weights edited, same name, size and time", happens=_edited_weights, status=2,
          message="weights.model.safetensors:",
          outcome="another identity: train refuses and says what differs"),
    Fault(name="changed tokenizer", happens=_other_tokenizer, status=2, message="the cache lacks",
          outcome="other ids, other keys: train refuses"),
    Fault(name="changed max_length", happens=_other_max_length, status=2, message="the cache lacks",
          outcome="cut rows have other keys: train refuses"),
    Fault(name="changed chat template", happens=_other_template, status=2, message="the cache lacks",
          outcome="other ids, other keys: train refuses"),
    Fault(name="changed dtype", happens=_other_dtype, status=2, message="dtype: float32 -> bfloat16",
          outcome="another identity: train refuses and says what differs"),
    Fault(name="NaN written into a shard", happens=_nan_in_a_shard, status=2, message="not finite",
          outcome="train refuses and names the file"),
    Fault(name="NaN in the model's weights", happens=_nan_in_the_weights, status=2, message="not finite",
          outcome="precompute-ref stops, and stores none of the batch"),
    Fault(name="disk full", happens=_disk_full, status=2, message="No space left on device",
          outcome="precompute-ref stops; what it wrote is kept, and with more space it computes the rest"),
    Fault(name="read-only folder", happens=_read_only, status=2, message="Read-only file system",
          outcome="precompute-ref refuses before a model is loaded"),
    Fault(name="read-only folder with a full cache", happens=_read_only_and_full, status=0, message="audit:",
          outcome="train works, since it only reads"),
    Fault(name="values changed before a resume", happens=_changed_before_resume, status=2,
          message="other reference values", outcome="train refuses: it would not be the same run"),
    Fault(name="cache deleted before a resume", happens=_deleted_before_resume, status=2,
          message="the cache lacks",
          outcome="train refuses: the trained policy is never used as the reference"),
]  # fmt: skip


def try_fault(fault: Fault, folder: Path) -> None:
    """Tries one fault in an empty folder.

    Raises:
        AssertionError: Another status or message than expected.
        Skip: This machine cannot try it.
    """
    bench = make_bench(folder)
    status, output = fault.happens(bench)
    assert "Traceback" not in output, output
    assert status == fault.status, f"exit status {status}, expected {fault.status}: {output[-500:]}"
    assert fault.message in output, f"does not print {fault.message!r}: {output[-500:]}"


def main() -> int:
    """Prints the table; 1 if a fault did not end as expected."""
    failures = 0
    print("| fault | exit status | what happens |\n|---|---|---|")
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                try_fault(fault, Path(folder))
                print(f"| {fault.name} | {fault.status} | {fault.outcome} |", flush=True)
            except Skip as reason:
                print(f"| {fault.name} | | not tried: {reason} |", flush=True)
            except AssertionError as error:
                failures += 1
                print(f"| {fault.name} | | FAILED: {' '.join(str(error).split())} |", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
