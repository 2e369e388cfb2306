"""Prompts for `sample`: cut from any text to a fixed number of tokens, or those of preference data.

A text is documents separated by empty lines; a document is paragraphs, one per line. Prompts do not overlap,
and train and test prompts come from different documents where there are at least ten.
"""

import argparse
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_prep.files import Split
from data_prep.splits import open_inputs, prompt_key, read_inputs, source_of
from dpo import terminal
from dpo.data.fields import broken_at
from dpo.data.locate import files_of
from dpo.data.notes import RowNotes
from dpo.data.records import Message
from dpo.data.rows import group_from_row
from dpo.data.sources import open_source, read_rows
from dpo.errors import UserError

if TYPE_CHECKING:  # transformers takes seconds to import, and `--help` must not
    from transformers import PreTrainedTokenizerBase

FEWEST_DOCUMENTS = 10
"""With fewer, train and test prompts come from two disjoint parts of the text instead."""
HUB_ROWS_PER_PROMPT = 20
"""Rows of a hub data set that are read per requested prompt: some data sets are endless."""


class Prompt(NamedTuple):
    """One prompt, and the split of its group."""

    split: Split
    content: str | tuple[Message, ...]


def is_preference_folder(path: str) -> bool:
    """Whether `path` is a folder of preference data."""
    place = Path(path)
    return place.is_dir() and bool(files_of(place, "train", whole=False))


def ready_prompts(args: argparse.Namespace, notes: RowNotes) -> list[Prompt]:
    """The first distinct prompts of each split of the preference folder `args.input`.

    Args:
        args: input, num_prompts and num_test_prompts (None: all), and the options of `read_inputs`.
        notes: Counts faulty rows and unused columns.
    """
    limits: dict[Split, int | None] = {"train": args.num_prompts, "test": args.num_test_prompts}
    found: dict[Split, dict[str, Prompt]] = {"train": {}, "test": {}}
    inputs = open_inputs([args.input], [])
    convert = partial(group_from_row, notes=notes)
    for split, group in read_inputs(inputs, convert, prompt_key, args=args, notes=notes):
        found[split].setdefault(prompt_key(group), Prompt(split, group.prompt))
    return [prompt for split in found for prompt in islice(found[split].values(), limits[split])]


def read_documents(path: str, *, max_rows: int | None, num_prompts: int) -> Iterator[list[str]]:
    """Streams the documents of a text file, of a folder of such, or of a data set with a column `text`.

    Args:
        path: A .txt, .txt.gz or .txt.xz file, or a folder of such: an empty line or the end of a file ends a
            document. Or a .jsonl or .parquet file, or a hub name: a row is a document.
        max_rows: Read at most this many lines or rows; None: all, of a hub data set as many as `num_prompts`
            may need.
        num_prompts: How many prompts will be cut.

    Yields:
        The paragraphs of a document, at least one, without surrounding white space.

    Raises:
        UserError: Nothing is there, a damaged file, or rows without text.
    """
    from dpo.data.text import TEXT_SUFFIXES, is_text, lines_of, text_files

    if is_text(path):
        files = text_files(Path(path))
        lines = chain.from_iterable(chain(lines_of(file, "input"), [""]) for file in files)
        for empty, paragraphs in groupby(islice(lines, max_rows), key=lambda line: not line):
            if not empty:
                yield list(paragraphs)
        return
    if Path(path).is_dir():
        raise UserError(
            f"input: the folder {path} has no file that ends with {', '.join(TEXT_SUFFIXES)} and no "
            "train.parquet; expected texts or a preference folder"
        )
    source = open_source(source_of(path), "train", key="input")
    if max_rows or not source.files:
        options = replace(source.options, rows=max_rows or HUB_ROWS_PER_PROMPT * num_prompts)
        source = replace(source, options=options)
    for place, row in read_rows(source):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise UserError(f"{place}: no column `text` with a string; expected a text data set")
        if broken_at(row["text"]) is not None:
            raise UserError(f"{place}: half of a surrogate pair in `text`; expected Unicode: correct the row")
        if row["text"].strip():
            yield [line.strip() for line in row["text"].splitlines() if line.strip()]


def text_prompts(
    documents: Iterable[Sequence[str]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    prompt_tokens: int,
    num_prompts: int,
    num_test_prompts: int,
    seed: int,
) -> list[Prompt]:
    """Cuts prompts that start at paragraphs, spread evenly over the text.

    Args:
        documents: Lists of paragraphs.
        tokenizer: Counts the tokens; special tokens are not part of a prompt.
        prompt_tokens: Length of every prompt, in tokens, also when its text is tokenized again.
        num_prompts: Number of prompts of the train split.
        num_test_prompts: Number of prompts of the test split.
        seed: Decides which documents are held out.

    Raises:
        UserError: The text is too short for that many prompts.
    """
    documents = terminal.progress(documents, description="cut prompts", unit="documents")
    cut = [cut_prompts(document, tokenizer, prompt_tokens) for document in documents]
    train, test = _split([prompts for prompts in cut if prompts], num_prompts, num_test_prompts, seed)
    if len(train) < num_prompts or len(test) < num_test_prompts:
        raise UserError(
            f"input: the text has {len(train)} train and {len(test)} test prompts of {prompt_tokens} tokens; "
            f"expected {num_prompts} and {num_test_prompts}: give more text, or lower --num_prompts, "
            "--num_test_prompts or --prompt_tokens"
        )
    return [
        *(Prompt("train", text) for text in _spread(train, num_prompts)),
        *(Prompt("test", text) for text in _spread(test, num_test_prompts)),
    ]


def cut_prompts(
    paragraphs: Sequence[str], tokenizer: "PreTrainedTokenizerBase", num_tokens: int
) -> list[str]:
    """All prompts of one document: each a paragraph, joined by newlines with the next while it is too short.

    A prompt whose text is tokenized to other ids (because it was cut inside a letter, say) is dropped.
    """
    lengths = map(len, _encode(paragraphs, tokenizer))
    pieces: list[str] = []
    open_paragraphs: list[str] = []
    num_open_tokens = 0
    for paragraph, length in zip(paragraphs, lengths, strict=True):
        open_paragraphs.append(paragraph)
        num_open_tokens += length
        if num_open_tokens >= num_tokens:
            pieces.append("\n".join(open_paragraphs))
            open_paragraphs, num_open_tokens = [], 0
    ids = [piece[:num_tokens] for piece in _encode(pieces, tokenizer)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return [
        text
        for text, before, after in zip(texts, ids, _encode(texts, tokenizer), strict=True)
        if before == after and len(after) == num_tokens
    ]


def _split(
    documents: Sequence[Sequence[str]], num_train: int, num_test: int, seed: int
) -> tuple[list[str], list[str]]:
    """Train and test prompts, each in the order of the text; no prompt is in both."""
    total = sum(map(len, documents))
    wanted = max(num_test, round(total * num_test / max(1, num_train + num_test)))
    if len(documents) < FEWEST_DOCUMENTS:
        pooled = list(chain.from_iterable(documents))
        train, test = pooled[: total - wanted], pooled[max(0, total - wanted) :]
    else:
        held_out: set[int] = set()
        num_held_out = 0
        for number in random.Random(seed).sample(range(len(documents)), len(documents)):
            size = len(documents[number])
            if num_held_out < wanted and total - num_held_out - size >= num_train:
                held_out.add(number)
                num_held_out += size
        train = [text for number, texts in enumerate(documents) if number not in held_out for text in texts]
        test = [text for number in sorted(held_out) for text in documents[number]]
    different = dict.fromkeys(train)
    return list(different), [text for text in dict.fromkeys(test) if text not in different]


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """`count` of the texts at equal distances, starting with the first."""
    return [texts[number * len(texts) // count] for number in range(count)]


def _encode(texts: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> list[list[int]]:
    return list(tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids) if texts else []
