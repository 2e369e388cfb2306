"""A tiny model, preference data and a complete reference cache, for the benchmarks of the cache."""

import contextlib
import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from dpo.cli.main import run
from dpo.reference.shards import read_shard, write_shard
from dpo.reference.store import ReferenceStore

WORDS = ("the", "cat", "day", "good", "bad", "film", "well", "mat", "we", "like", "ended", "on")
NUM_PAIRS = 24
Ended = tuple[int, str]  # exit status, and everything that was printed


@dataclass(frozen=True)
class Bench:
    """A folder with a tiny model, preference data, and a cache that covers the data."""

    folder: Path

    @property
    def model(self) -> Path:
        """The reference model's folder."""
        return self.folder / "model"

    @property
    def pairs(self) -> Path:
        """The preference data."""
        return self.folder / "pairs.jsonl"

    @property
    def store(self) -> ReferenceStore:
        """The cache that was built before anything was broken."""
        (identity,) = (self.folder / "reference").glob("*/identity.json")
        return ReferenceStore.at(identity.parent)

    def dpo(self, command: str, *more: str) -> Ended:
        """Runs a command on the experiment."""
        values = {
            "run_dir": self.folder / "run",
            "model.name_or_path": self.model,
            "model.dtype": "float32",
            "data.train": self.pairs,
            "data.cache_dir": self.folder / "tokenized",
            "reference.cache_dir": self.folder / "reference",
            "reference.max_tokens_per_batch": 128,
            "train.max_steps": 1,
        }
        arguments = [word for key, value in values.items() for word in (f"--{key}", str(value))]
        AcceleratorState._reset_state(reset_partial_state=True)  # as if the command had a process of its own
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            status = run([command, *arguments, *more])
        return status, output.getvalue()

    def rewrite(self, shift: float, *, identity: str | None = None, only_first: bool = False) -> None:
        """Replaces every shard by a well-formed one with other values."""
        store = self.store
        for path in store.shards():
            rows = read_shard(path, store.identity.digest)
            logps = rows.logps.copy()
            logps[: 1 if only_first else None] += shift
            path.unlink()
            write_shard(store.path, replace(rows, logps=logps), identity or store.identity.digest)


def make_bench(folder: Path) -> Bench:
    """Creates model, data and cache."""
    bench = Bench(folder)
    _write_model(bench.model)
    write_pairs(bench.pairs, NUM_PAIRS)
    must_succeed(bench.dpo("precompute-ref"))
    return bench


def must_succeed(ended: Ended) -> str:
    """What a command printed, which must have ended with status 0."""
    status, output = ended
    assert status == 0, output
    return output


def _write_model(folder: Path) -> None:
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=symbols[-1]).save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(symbols),
        n_positions=96,
        n_embd=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.2,
        bos_token_id=len(symbols) - 1,
        eos_token_id=len(symbols) - 1,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)


def write_pairs(path: Path, number: int) -> None:
    """Writes pairs of random words as JSON Lines."""
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(number):
        prompt, good, bad = (" ".join(rng.choice(WORDS, int(rng.integers(2, 5)))) for _ in range(3))
        rows.append({"prompt": prompt, "chosen": f" {good} yes", "rejected": f" {bad} no"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
