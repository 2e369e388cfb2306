"""Plain text as training data: files of documents, tokenized and cut into blocks."""

import gzip
import hashlib
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo import distributed, terminal
from dpo.config import DataConfig
from dpo.data.build import open_datasets, resolve_max_length
from dpo.data.dataset import FORMAT_VERSION, TokenizedDataset, map_dataset, write_dataset
from dpo.data.records import TokenizedGroup
from dpo.data.tokenize import tokenizer_digest
from dpo.errors import UserError

TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.xz")


LINES_PER_CALL = 4096


def open_text_or_preferences(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Training and held-out sequences in token ids.

    Args:
        data: Text files, or preference data.
        tokenizer: The policy's.
        positions: The model's longest sequence, or None without a limit.

    Raises:
        UserError: Missing or empty data.
    """
    if not isinstance(data.train, str) or not is_text(data.train):
        return open_datasets(data, tokenizer, positions)
    max_length = resolve_max_length(data.max_length, positions)
    train = _open_text(data.train, "data.train", data.cache_dir, tokenizer, max_length)
    if data.test is None:
        return train, None
    if not isinstance(data.test, str):
        raise UserError("data.test: a list; expected a text file or a folder of text files, as data.train")
    return train, _open_text(data.test, "data.test", data.cache_dir, tokenizer, max_length)


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
