"""Plain text: the one reader of text files, packed or not, and text as training data in blocks of tokens.

`sft` trains on text or on preferences; `open_text_or_preferences` opens either. Blocks are tokenized once, as
preferences are in `dpo.data.build`, and named by a digest of text, tokenizer and length.
"""

import gzip
import hashlib
import json
import lzma
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, TypeGuard

import numpy as np
from transformers import PreTrainedTokenizerBase

from dpo import distributed, terminal
from dpo.config import DataConfig, Sources
from dpo.data.build import open_datasets, resolve_max_length
from dpo.data.dataset import FORMAT_VERSION, TokenizedDataset, is_written, map_dataset, write_dataset
from dpo.data.locate import files_of
from dpo.data.records import TokenizedGroup
from dpo.data.tokenize import tokenizer_digest
from dpo.errors import UserError
from dpo.files import sha256_of

TEXT_SUFFIXES = (".txt", ".txt.gz", ".txt.xz")
PREFERENCE_OPTIONS = (
    "max_prompt_length",
    "too_long",
    "group_pairs",
    "pairing",
    "min_margin",
    "append_eos",
    "strict",
)
"""Options of `DataConfig` that text does not use."""
LINES_PER_CALL = 4096  # the fast tokenizers work in parallel inside one call

_OPENERS: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".xz": lzma.open}


def is_text(source: Sources) -> TypeGuard[str]:
    """Whether this is a text file or a folder of text files; anything else is preference data.

    A folder with files of training preferences is preference data, also when text files are beside it.
    """
    if not isinstance(source, str):
        return False
    path = Path(source)
    if path.is_dir():
        return bool(text_files(path)) and not files_of(path, "train", whole=False)
    return source.endswith(TEXT_SUFFIXES)


def text_files(path: Path) -> list[Path]:
    """The text files of a folder in name order; anything but a folder is one file."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.name.endswith(TEXT_SUFFIXES) and file.is_file())


def read_lines(path: str, key: str) -> Iterator[str]:
    """Streams the lines that are not empty, of a text file or of a folder's text files in name order.

    Args:
        path: A file or a folder.
        key: The option that holds `path`, for messages.

    Yields:
        Lines without the white space around them.

    Raises:
        UserError: A file is missing or cannot be read as text.
    """
    for file in text_files(Path(path)):
        yield from filter(None, lines_of(file, key))


def lines_of(file: Path, key: str) -> Iterator[str]:
    """Streams every line of one text file, empty ones too; as `read_lines`."""
    if not file.is_file():
        raise UserError(f"{key}: {file} does not exist; expected a text file or a folder of text files")
    try:
        with _OPENERS.get(file.suffix, open)(file, mode="rt", encoding="utf-8") as lines:
            yield from map(str.strip, lines)
    except (UnicodeDecodeError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise UserError(
            f"{key}: {file}: cannot be read to its end ({error}); expected UTF-8 text: plain, .gz or .xz"
        ) from error


def check_text(data: DataConfig) -> None:
    """Reads the first line of training and held-out text.

    Raises:
        UserError: An option that text does not use, a file that is missing, or one without text.
    """
    defaults = DataConfig(train=data.train)
    for name in PREFERENCE_OPTIONS:
        if (value := getattr(data, name)) != getattr(defaults, name):
            raise UserError(f"data.{name}: {value}; data.train is text, which does not use it: leave it out")
    for key, source in (("data.train", data.train), ("data.test", data.test)):
        if source is None:
            continue
        if not is_text(source):
            raise UserError(
                f"{key}: {source}; data.train is text, so expected a file that ends with one of "
                f"{', '.join(TEXT_SUFFIXES)}, or a folder of such"
            )
        if next(read_lines(source, key), None) is None:
            raise UserError(f"{key}: {source} has no text; expected one document per line")


def open_text_or_preferences(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, positions: int | None
) -> tuple[TokenizedDataset, TokenizedDataset | None]:
    """Training and held-out sequences in token ids; rank 0 tokenizes what is not there yet.

    Args:
        data: Preferences, or a text file or folder; of text, `max_length`, `test` and `cache_dir` are used.
        tokenizer: The policy's tokenizer.
        positions: The model's longest sequence in tokens, or None without a limit.

    Returns:
        Groups with pairs, or for text groups of one completion without pairs: a block of at most
        `max_length` tokens whose first token is the prompt.

    Raises:
        UserError: Missing or malformed data, or options that this kind of data does not use.
    """
    if not is_text(data.train):
        return open_datasets(data, tokenizer, positions)
    check_text(data)
    max_length = resolve_max_length(data.max_length, positions)
    train = _open_text(data.train, "data.train", Path(data.cache_dir), tokenizer, max_length)
    if data.test is None:
        return train, None
    assert is_text(data.test)
    return train, _open_text(data.test, "data.test", Path(data.cache_dir), tokenizer, max_length)


def _open_text(
    path: str, key: str, cache_dir: Path, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> TokenizedDataset:
    content = [sha256_of(file) for file in text_files(Path(path))]
    decisive = ["text", FORMAT_VERSION, content, tokenizer_digest(tokenizer), max_length]
    digest = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
    folder = cache_dir / digest[:16]

    def tokenize_once() -> None:
        if not is_written(folder):
            lines = terminal.progress(
                read_lines(path, key), description="tokenize text", unit="lines", leave=False
            )
            write_dataset(_blocks(iter(lines), tokenizer, max_length), folder, Counter())

    distributed.on_main(tokenize_once)
    return map_dataset(folder, digest)


def _blocks(
    lines: Iterator[str], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Iterator[TokenizedGroup]:
    """All documents in one stream, with EOS before, between and after them, cut into blocks of max_length."""
    eos = int(tokenizer.eos_token_id)
    waiting = [eos]
    while chunk := list(islice(lines, LINES_PER_CALL)):
        for ids in tokenizer(chunk, add_special_tokens=False, verbose=False).input_ids:
            waiting.extend([*ids, eos])
        start = 0
        while len(waiting) - start > max_length:
            yield _block(waiting[start : start + max_length])
            start += max_length
        del waiting[:start]
    if len(waiting) > 1:
        yield _block(waiting)


def _block(ids: list[int]) -> TokenizedGroup:
    """A block as a group: its first token has no predictor, so it is the prompt."""
    tokens = np.asarray(ids, dtype=np.int32)
    return TokenizedGroup(prompt=tokens[:1], completions=(tokens[1:],), pairs=())
