"""Supervised fine-tuning: next tokens of text, or the chosen completions of preference data given their
prompts.

The paper's first stage, its preferred-FT baseline, and the way to a base model where there is none: from
random weights with a tokenizer trained on the text. A sequence is a group with one completion and no pairs,
so that data, plan, engine and loop are those of preference training.
"""

import gzip
import hashlib
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpo import distributed, terminal
from dpo.config import DataConfig, SftDataConfig
from dpo.data.dataset import FORMAT_VERSION, TokenizedDataset, map_dataset, write_dataset
from dpo.data.opening import open_datasets, resolve_max_length
from dpo.data.plan import Int64s, share
from dpo.data.prefetch import prefetch
from dpo.data.tokenize import tokenizer_digest
from dpo.data.trees import Layout, Tree, TreeBatch, tree_batch
from dpo.errors import UserError
from dpo.monitor import MetricSums
from dpo.records import TokenizedGroup

TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.xz")
LINES_PER_CALL = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class NextTokenObjective:
    """Minimizes the negative log-likelihood, averaged over the completion tokens of a step."""

    dataset: TokenizedDataset
    unit: str = "sequences"
    per_token: bool = False

    def trees(self, groups: Int64s) -> list[Tree]:
        """The prompts of these groups with their chosen completions, or the one there is."""
        found: list[Tree] = []
        for group in (self.dataset[int(index)] for index in groups):
            wanted = dict.fromkeys(pair.chosen for pair in group.pairs) or {0: None}
            found.append((group.prompt, [group.completions[index] for index in wanted]))
        return found

    def count(self, groups: Int64s) -> int:
        """Completion tokens of these groups."""
        return sum(len(completion) for _, completions in self.trees(groups) for completion in completions)

    def num_units(self, groups: Int64s) -> int:
        """Sequences of these groups."""
        return sum(len(completions) for _, completions in self.trees(groups))

    def batch(self, groups: Int64s, layout: Layout) -> TreeBatch:
        """Trees of these sequences."""
        return tree_batch(self.trees(groups), layout)

    def loss(self, logps: Tensor, batch: TreeBatch, sums: MetricSums) -> Tensor:
        """Sum of the tokens' losses; see `Objective.loss`."""
        sums.add_values({"loss": -logps.detach().sum()}, len(batch.targets))
        return -logps.sum()


def held_out_loss(
    score: Callable[[TreeBatch], Tensor],
    dataset: TokenizedDataset,
    *,
    layout: Layout,
    budget: int,
    device: torch.device,
) -> dict[str, float]:
    """{"eval/loss": nats a token} over all sequences of a data set, summed over ranks.

    Args:
        score: (S,) log-probs of a batch, without gradient.
        dataset: The held-out data.
        layout: How the batches are laid out.
        budget: Tokens of one batch.
        device: Where batches belong.
    """
    objective, sums = NextTokenObjective(dataset=dataset), MetricSums()
    everything = np.arange(len(dataset))
    shares = share(dataset.sizes(everything, layout), world_size=distributed.world_size(), budget=budget)

    def build(positions: list[int]) -> TreeBatch:
        return objective.batch(everything[positions], layout).to(device)

    for batch in prefetch(build, shares[distributed.rank()]):
        sums.add_values({"eval/loss": -score(batch).sum()}, len(batch.targets))
    return sums.means()


def open_text_or_preferences(
    data: SftDataConfig, tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Training and held-out sequences in token ids.

    Args:
        data: Text files, or preference data.
        tokenizer: The policy's.
        positions: The model's longest sequence, or None without a limit.

    Raises:
        UserError: Missing or empty data.
    """
    if not is_text(data.train):
        preferences = DataConfig(
            train=data.train,
            test=data.test,
            max_length=data.max_length,
            append_eos=data.append_eos,
            strict=data.strict,
            cache_dir=data.cache_dir,
        )
        return open_datasets(preferences, tokenizer, positions)
    max_length = resolve_max_length(data.max_length, positions)
    train = _open_text(data.train, "data.train", data.cache_dir, tokenizer, max_length)
    test = _open_text(data.test, "data.test", data.cache_dir, tokenizer, max_length) if data.test else None
    return train, test


def is_text(path: str) -> bool:
    """Whether this is a text file or a folder of text files, rather than preference data.

    A prepared folder stays one when text stands beside its train.parquet.
    """
    folder = Path(path)
    if folder.is_dir():
        return bool(_text_files(folder)) and not (folder / "train.parquet").is_file()
    return path.endswith(TEXT_SUFFIXES)


def read_lines(path: str, key: str) -> Iterator[str]:
    """Non-empty lines of a text file, or of the text files of a folder in name order.

    Raises:
        UserError: No such file, or not UTF-8 text.
    """
    source = Path(path)
    files = _text_files(source) if source.is_dir() else [source]
    for file in files:
        if not file.is_file():
            raise UserError(f"{key}: {file} does not exist; expected a text file or a folder of text files")
        try:
            with _open_file(file) as lines:
                yield from (line.strip() for line in lines if line.strip())
        except (UnicodeDecodeError, lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError) as error:
            raise UserError(
                f"{key}: {file}: not readable as text ({error}); expected UTF-8, plain, gzip or xz"
            ) from error


def _text_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name.endswith(TEXT_SUFFIXES))


def _open_file(file: Path) -> IO[str]:
    if file.suffix == ".gz":
        return gzip.open(file, "rt", encoding="utf-8")
    if file.suffix == ".xz":
        return lzma.open(file, "rt", encoding="utf-8")
    return file.open(encoding="utf-8")


def _open_text(
    path: str, key: str, cache_dir: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> TokenizedDataset:
    source = Path(path)
    files = _text_files(source) if source.is_dir() else [source]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise UserError(f"{key}: {missing[0]} does not exist; expected a text file or a folder of text files")
    content = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    decisive = ["text", FORMAT_VERSION, content, tokenizer_digest(tokenizer), max_length]
    digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
    folder = Path(cache_dir) / digest[:16]

    def write_once() -> None:
        if not (folder / "counts.json").is_file():
            write_dataset(_blocks(path, key, tokenizer, max_length), folder, Counter())

    distributed.on_main(write_once)
    dataset = map_dataset(folder, digest)
    if len(dataset) == 0:
        raise UserError(f"{key}: {path} has no text; expected a document a line")
    return dataset


def _blocks(
    path: str, key: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[TokenizedGroup]:
    """All documents one after the other, each started and ended by EOS, cut into blocks of max_length
    tokens.
    """
    eos = int(tokenizer.eos_token_id)
    waiting = [eos]
    lines = terminal.progress(read_lines(path, key), description="tokenize text", unit="lines", leave=False)
    for chunk in _chunks(lines):
        for ids in tokenizer(chunk, add_special_tokens=False, verbose=False).input_ids:
            waiting.extend([*ids, eos])
        start = 0
        while len(waiting) - start > max_length:
            yield _block(waiting[start : start + max_length])
            start += max_length
        del waiting[:start]
    if len(waiting) > 1:
        yield _block(waiting)


def _chunks(lines: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for line in lines:
        chunk.append(line)
        if len(chunk) == LINES_PER_CALL:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _block(ids: list[int]) -> TokenizedGroup:
    """The first token has no predictor and so is the prompt."""
    tokens = np.asarray(ids, dtype=np.int32)
    return TokenizedGroup(prompt=tokens[:1], completions=(tokens[1:],), pairs=())
