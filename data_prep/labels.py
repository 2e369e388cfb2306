"""OpenAI's lm-human-preferences labels (arXiv 1909.08593): people's choice of the best of 4 continuations.

The published files hold GPT-2 token ids, which are decoded here; copies on the hub hold text. The best of 4
becomes a group of 4 completions and 3 pairs, best against rest. Continuations were sampled to a fixed length,
so completions are fragments.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    UnknownHandler,
)

from tqdm import tqdm

from data_prep.files import PreferenceWriter, Split, describe_arguments, describe_file
from data_prep.splits import Rows, open_inputs, prompt_key, split_groups
from dpo.data.fields import Fields, RowError
from dpo.data.notes import RowNotes
from dpo.data.records import Pair, PreferenceGroup
from dpo.data.rows import group_from_row
from dpo.errors import UserError

SUMMARY = "OpenAI's lm-human-preferences labels: the best of 4 continuations, as groups of 3 pairs."

URL = "https://openaipublic.blob.core.windows.net/lm-human-preferences/labels/{file}"
FILES = {
    "sentiment": "sentiment/offline_5k.json",
    "descriptiveness": "descriptiveness/offline_5k.json",
    "tldr": "tldr/online_45k.json",
    "cnndm": "cnndm/online_45k.json",
}
"""Task -> the file that the paper's authors train on."""

SAMPLES = ("sample0", "sample1", "sample2", "sample3")
PADDING = 50259


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this source."""
    parser.add_argument(
        "--task",
        choices=tuple(FILES),
        default="sentiment",
        help="which labels to download (default: sentiment)",
    )
    parser.add_argument(
        "--input",
        metavar="INPUT",
        help="read this instead of downloading: a published .json file, .jsonl of the same rows as ids or "
        "text, or the hub's text version, such as trl-lib/lm-human-preferences-sentiment",
    )
    parser.add_argument(
        "--tokenizer", default="gpt2", help="GPT-2's tokenizer: a folder or a hub name (default: gpt2)"
    )


def run(args: argparse.Namespace) -> None:
    """Writes the preference files. Raises UserError."""
    with PreferenceWriter(
        args.output,
        overwrite=args.overwrite,
        completions_are_complete=False,
        source=describe_arguments(args),
    ) as writer:
        rows: dict[Split, Rows]
        if args.input is not None and not args.input.endswith(".json"):
            inputs = open_inputs([args.input], [])
            rows = inputs.rows()
            writer.sources.extend(inputs.describe())
        elif args.input is not None:
            path = Path(args.input).expanduser()
            rows = {"train": _published_rows(path)}
            writer.sources.append(describe_file(path))
        else:
            url = URL.format(file=FILES[args.task])
            path = writer.folder / Path(url).name
            download(url, path)
            rows = {"train": _published_rows(path)}
            writer.sources.append({**describe_file(path), "name": url})
            path.unlink()
        convert = partial(label_group, decode=Decoder(args.tokenizer), notes=writer.notes)
        writer.write_all(split_groups(rows, convert, prompt_key, args=args, notes=writer.notes))


def label_group(row: Any, *, decode: Callable[[list[int]], str], notes: RowNotes) -> PreferenceGroup:
    """One row as a group: {query, sample0..sample3, best} in token ids or text, or a plain preference pair.

    Args:
        row: The raw row.
        decode: GPT-2 token ids -> text.
        notes: Counts the pairs that are not made because both texts are the same, and unused columns.

    Raises:
        RowError: A faulty row, or four equal texts.
    """
    if not isinstance(row, Mapping) or "query" not in row:
        return group_from_row(row, notes=notes)
    fields = Fields(row, {})
    best = fields.get("best")
    if type(best) is not int or not 0 <= best < len(SAMPLES):
        raise RowError(
            "bad_best", f"best is {best!r}; expected the index of a sample, 0 to {len(SAMPLES) - 1}"
        )
    prompt, *completions = (_text(fields, name, decode) for name in ("query", *SAMPLES))
    if not all(completion.strip() for completion in completions):
        raise RowError("empty_completion", "a sample has no text")
    rest = [index for index in range(len(SAMPLES)) if index != best]
    pairs = tuple(Pair(best, index) for index in rest if completions[index] != completions[best])
    if not pairs:
        raise RowError("identical_completions", "all samples have the same text")
    if len(pairs) < len(rest):
        notes.drops["pair_identical_to_best"] += len(rest) - len(pairs)
    notes.ignored.update(fields.unread())
    return PreferenceGroup(prompt=prompt, completions=tuple(completions), pairs=pairs)


GPT2_PROBE, GPT2_PROBE_TEXT = (15496, 11, 995), "Hello, world"


class Decoder:
    """GPT-2 token ids -> text. The tokenizer is loaded at the first row of ids, so text does not need it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tokenizer: Any = None

    def __call__(self, ids: list[int]) -> str:
        """The text of the ids, byte for byte.

        Raises:
            RowError: An id is not in the vocabulary.
            UserError: The tokenizer cannot be loaded, or is not GPT-2's.
        """
        if self._tokenizer is None:
            self._tokenizer = self._load()
        if any(token >= len(self._tokenizer) for token in ids):
            raise RowError("bad_token_ids", f"a token id is not below {len(self._tokenizer)}")
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _load(self) -> Any:
        from transformers import AutoTokenizer  # takes seconds to import

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._name)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--tokenizer: {self._name} is not a tokenizer folder, and loading it from the hub failed "
                f"({type(error).__name__}); expected a folder with GPT-2's tokenizer, or gpt2"
            ) from error
        # Any vocabulary that is large enough would decode the labels, but into nonsense.
        if len(tokenizer) <= max(GPT2_PROBE) or tokenizer.decode(list(GPT2_PROBE)) != GPT2_PROBE_TEXT:
            raise UserError(
                f"--tokenizer: {self._name} does not have GPT-2's vocabulary, which the labels are in; "
                "expected a folder with GPT-2's tokenizer, or gpt2"
            )
        return tokenizer


def https_only() -> OpenerDirector:
    """An opener for https addresses only, also after redirects."""
    opener = OpenerDirector()
    handlers = (ProxyHandler, HTTPSHandler, HTTPRedirectHandler, HTTPErrorProcessor, HTTPDefaultErrorHandler)
    for handler in (*handlers, UnknownHandler):
        opener.add_handler(handler())
    return opener


def download(url: str, path: Path) -> None:
    """Downloads a file, with a progress bar.

    Raises:
        UserError: No network, an incomplete file, or an address that is not https.
    """
    try:
        with https_only().open(url, timeout=30) as response, path.open("wb") as file:
            total = int(response.headers.get("Content-Length", 0)) or None
            with tqdm.wrapattr(response, "read", total=total, desc="download") as stream:
                shutil.copyfileobj(stream, file)
            received = file.tell()
    except OSError as error:
        raise UserError(
            f"--task: {url} could not be fetched ({error}); fetch it elsewhere and give the file as --input"
        ) from error
    if total is not None and received != total:
        raise UserError(f"--task: {url} ended after {received:,} of {total:,} bytes; try again")


def _published_rows(path: Path) -> Rows:
    """The rows of a published file: one JSON list of objects, tens of megabytes."""
    try:
        rows = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UserError(f"--input: {path} does not exist; leave it out to download the labels") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); expected the published list of labels") from error
    if not isinstance(rows, list):
        raise UserError(f"{path}: a JSON {type(rows).__name__}; expected the published list of labels")
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=1))


def _text(fields: Fields, name: str, decode: Callable[[list[int]], str]) -> str:
    value = fields.get(name)
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise RowError(
            "bad_token_ids", f"{name} is a {type(value).__name__}; expected text or a list of token ids"
        )
    return decode([token for token in value if token != PADDING])
